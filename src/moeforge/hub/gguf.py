"""A decoder as one GGUF file, for llama.cpp and what is built on it. Needs the ``gguf`` package.

Which architectures of llama.cpp there are, and what each takes for granted, is its ``src/models/*.cpp``; names of
tensors and metadata are the ``gguf`` package's ``constants.py``.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeforge.config import Tree
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.families import FAMILIES
from moeforge.hub.gguf_tokenizer import add_tokenizer
from moeforge.hub.pretrained import Pretrained
from moeforge.hub.rotary import paired
from moeforge.hub.whole import write_file
from moeforge.models import Decoder, LayerConfig, ModelConfig
from moeforge.models.weights import check_whole


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's."""

    name: str
    pairs: bool = False
    """Whether it turns neighbouring values of a head, so that rows of queries and keys change places."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the family's config.json that it has no choice about."""


PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True, fixed=PLAIN),
    "mixtral": Architecture("llama", pairs=True, fixed=PLAIN),
    "olmoe": Architecture(
        "olmoe", fixed=PLAIN | {"norm_topk_prob": False, "clip_qkv": None, "tie_word_embeddings": False}
    ),
    "qwen3": Architecture("qwen3", fixed=PLAIN),
    "qwen3_moe": Architecture("qwen3moe", fixed=PLAIN | {"norm_topk_prob": True}),
}
"""By the family whose models it runs."""

NAMES: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "output.weight": ("output.weight",),
    "attention_norm.weight": ("attn_norm.weight",),
    "attention.q_proj.weight": ("attn_q.weight",),
    "attention.k_proj.weight": ("attn_k.weight",),
    "attention.v_proj.weight": ("attn_v.weight",),
    "attention.o_proj.weight": ("attn_output.weight",),
    "attention.q_norm.weight": ("attn_q_norm.weight",),
    "attention.k_norm.weight": ("attn_k_norm.weight",),
    "mlp_norm.weight": ("ffn_norm.weight",),
    "mlp.gate_up_proj.weight": ("ffn_gate.weight", "ffn_up.weight"),
    "mlp.down_proj.weight": ("ffn_down.weight",),
    "moe.router.gate.weight": ("ffn_gate_inp.weight",),
    "moe.banks.0.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "moe.banks.0.down_proj": ("ffn_down_exps.weight",),
}
"""Our parameter, within its block where it has one -> the tensors that are its equal slices by output dimension."""

ALWAYS_FLOAT32 = "ffn_gate_inp.weight"
"""Besides all vectors."""


def save(model: Decoder, tokenizer: Tokenizer, path: Path, verify: bool = False) -> str:
    """Writes ``path`` whole or not at all, weights in the type they have, and returns the architecture's name.

    With ``verify`` it is there only if it reads back the same. Raises UserError where ``gguf`` is missing, where
    llama.cpp has no architecture for the model or no name for how the tokenizer cuts, and when it cannot write.
    """
    if find_spec("gguf") is None:
        raise UserError("GGUF files need the gguf package, which is not installed: pip install 'moeforge[gguf]'")
    import gguf
    import numpy

    check_whole(model)
    architecture = _architecture(model)
    quantization = gguf.GGMLQuantizationType
    types = {torch.float32: quantization.F32, torch.float16: quantization.F16, torch.bfloat16: quantization.BF16}
    dtype = model.embedding.weight.dtype
    if dtype not in types:
        raise UserError(f"{path}: weights are {dtype}; a GGUF file is written from bf16, fp16 or fp32 (--dtype)")

    def fill(fresh: Path) -> None:
        writer = gguf.GGUFWriter(fresh, architecture.name)
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == torch.float32 else 'MOSTLY'}_{types[dtype].name}"])
        for name, value in _metadata(model.config).items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture.name}.{name}", value)
        add_tokenizer(writer, tokenizer, model.config.vocab_size or 0)
        if template := _chat_template(model):
            writer.add_chat_template(template)
        for name, tensor in _tensors(model, architecture, torch.device("meta")):
            writer.add_tensor_info(name, tensor.shape, numpy.dtype("V"), tensor.nbytes, types[tensor.dtype])
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor in _tensors(model, architecture, torch.device("cpu")):
                writer.write_tensor_data(_bytes(tensor))
        if verify:
            _verify(fresh, _tensors(model, architecture, torch.device("cpu")))

    write_file(path, fill)
    return architecture.name


def _architecture(model: Decoder) -> Architecture:
    """The one that computes what ``model`` does. Raises UserError with what stands against each."""
    objections, layers = {}, model.config.all_layers
    for kind, architecture in ARCHITECTURES.items():
        family = FAMILIES[kind]
        try:
            theirs = family.defaults | family.write(model.config)
        except UserError as error:
            objections[kind] = str(error)
            continue
        fixed = architecture.fixed.items()
        differing = [f"{name} = {theirs[name]!r}" for name, value in fixed if theirs.get(name, value) != value]
        differing += [f"rope = {model.config.rope.type}"] if model.config.rope else []
        differing += [f"window = {window}" for window in {layer.window for layer in layers} if window]
        differing += ["layers without experts beside those with some"] if len({*map(_sparse, layers)}) > 1 else []
        if not differing:
            return architecture
        objections[kind] = f"llama.cpp's {architecture.name} cannot have {', '.join(differing)}"
    shortest = min(objections.values(), key=len)
    raise UserError(f"no GGUF for this model: what can be written is {', '.join(ARCHITECTURES)}. {shortest}")


def _sparse(layer: LayerConfig) -> bool:
    return layer.moe is not None


def _chat_template(model: Decoder) -> str | None:
    """Of the folder that the model comes from."""
    if not isinstance(model, Pretrained):
        return None
    alone, settings = (model.origin.folder / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    if alone.exists():
        return alone.read_text(encoding="utf-8")
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.exists() else None
    return template if isinstance(template, str) else None


def _verify(path: Path, expected: Iterator[tuple[str, Tensor]]) -> None:
    """Raises UserError unless the file holds just these tensors, byte for byte."""
    import numpy
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, tensor in expected:
        read = found.pop(name, None)
        same = read is not None and [*map(int, read.shape)] == [*tensor.shape][::-1]
        if not same or not numpy.array_equal(read.data.view(numpy.uint8).ravel(), _bytes(tensor)):
            raise UserError(f"{path}: {name} does not read back as it was written")
    if found:
        raise UserError(f"{path} holds more than was written: {', '.join(found)}")


def _bytes(tensor: Tensor) -> Any:
    """As a flat array of numpy, which has no bfloat16."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _metadata(config: ModelConfig) -> Tree:
    """What llama.cpp reads of the model's shape, by key after the architecture's name."""
    moe = config.all_layers[0].moe
    tree: Tree = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "feed_forward_length": moe.experts[0].d_expert if moe else config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_key_heads,
        "attention.key_length": config.size_of_head,
        "attention.value_length": config.size_of_head,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.size_of_head,
        "rope.freq_base": config.rope_theta,
    }
    if moe:
        tree |= {"expert_count": moe.num_experts, "expert_used_count": moe.router.select.k}
        tree |= {"expert_feed_forward_length": moe.experts[0].d_expert}
    return tree


def _tensors(model: Decoder, architecture: Architecture, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each, in the order of the model's parameters, made one at a time."""
    heads = {"attn_q.weight": model.config.num_heads, "attn_k.weight": model.config.num_key_heads}
    for parameter, tensor in model.state_dict().items():
        *block, row = parameter.split(".", 2) if parameter.startswith("blocks.") else (parameter,)
        parts = tensor.to(device).chunk(len(NAMES[row]), dim=-2) if tensor.ndim > 1 else (tensor.to(device),)
        for name, part in zip(NAMES[row], parts, strict=True):
            if architecture.pairs and name in heads:
                part = paired(part, heads[name])
            if part.ndim == 1 or name == ALWAYS_FLOAT32:
                part = part.float()
            yield f"blk.{block[1]}.{name}" if block else name, part
