"""Records made by hand: runs whose numbers a test knows."""

from moeforge.analyze import Record, Sample, kinds_of, tally
from moeforge.data.document import Document
from moeforge.data.packing import pack
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.models import Decoder, ModelConfig, measure

NASTY = "<script>alert('x')</script> & more\n"
EXPERTS = {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": {"type": "top_k", "k": 2}}}


def made(name: str, bits: list[float], seconds: list[float], routed: bool = True) -> Record:
    """A run with evaluations ``bits`` at training times ``seconds``, of 100 steps and 1000 tokens each."""
    shape = {"vocab_size": 257, "d_model": 16, "num_layers": 2, "num_heads": 2}
    config = ModelConfig.model_validate({**shape, **({"moe": EXPERTS} if routed else {})})
    documents = [Document("a", "def f(x):\n    return x + 1\n" * 4)]
    tokenizer = train_or_open(Bytes(), documents)
    packed = pack(documents, tokenizer)
    usage = tally(Decoder(config).eval(), packed, kinds_of(packed, tokenizer), seq_len=32) if routed else {}
    chosen = {0: [3, 1], 1: [0, 2]} if routed else {}
    return Record(
        name=name,
        folder=f"runs/{name}",
        settings={"name": name, "seed": 0, "recipe": None, "optimizer": {"lr": bits[0]}},
        lines=[line(index, values, routed) for index, values in enumerate(zip(bits, seconds, strict=True))],
        size=measure(config),
        bits_per_byte=bits[-1],
        usage=usage,
        tokens=tokenizer.pieces(range(257)),
        samples=[Sample("<scr", list(NASTY), [chosen] * len(NASTY))],
    )


def line(index: int, values: tuple[float, float], routed: bool) -> dict[str, object]:
    """One line of a metrics file, with an evaluation."""
    bits, seconds = values
    load = {f"moe/tokens_per_expert/layer_{layer:02d}": [100, 300, 0, 0] for layer in (0, 1)} if routed else {}
    progress = {"perf/total_seconds": seconds, "perf/total_tokens": 1000 * (index + 1)}
    return {"step": 100 * (index + 1), "eval/bits_per_byte": bits, **progress, **load}
