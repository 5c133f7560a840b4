"""GGUF files: names, shapes and values as llama.cpp reads them, and a tokenizer that it runs alike."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from torch import Tensor

import moeforge
from moeforge.data.document import Document
from moeforge.data.tokenizers import BPE, Bytes, Tokenizer, train_or_open
from moeforge.errors import UserError
from moeforge.hub import gguf as ours
from moeforge.hub import llama2c
from moeforge.models import Decoder, ModelConfig
from tests.hub import families
from tests.hub import llama2c as twin

gguf = pytest.importorskip("gguf", reason="pip install 'moeforge[gguf]'")
pytest.importorskip("transformers", reason="pip install 'moeforge[hf]'")

WORDS = train_or_open(BPE(vocab_size=300), [Document("text", "the cat sat on the mat " * 30)])
SIZES = {"vocab_size": 304, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CASES = {
    "llama": ("llama", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "mixtral": ("llama", {"sliding_window": None}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3moe", {"norm_topk_prob": True, "head_dim": 16}),
}
ROWS = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip


def expected(theirs: torch.nn.Module, pairs: bool) -> dict[str, Tensor]:
    """llama.cpp's tensors from transformers' model in memory."""
    state, config, found = theirs.state_dict(), theirs.config, {}
    places = [("", "model."), *((f"blk.{n}.", f"model.layers.{n}.") for n in range(config.num_hidden_layers))]
    for ours_at, theirs_at in places:
        for row, name in ROWS.items():
            if (tensor := state.get(f"{theirs_at}{name}.weight")) is not None:
                found[f"{ours_at}{row}.weight"] = tensor
        fused = state.get(f"{theirs_at}mlp.experts.gate_up_proj")
        if fused is not None:
            found[f"{ours_at}ffn_gate_exps.weight"], found[f"{ours_at}ffn_up_exps.weight"] = fused.chunk(2, 1)
            found[f"{ours_at}ffn_down_exps.weight"] = state[f"{theirs_at}mlp.experts.down_proj"]
    if not config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for name in [name for name in found if pairs and name.endswith(("attn_q.weight", "attn_k.weight"))]:
        rows = found[name].view(-1, 2, config.head_dim // 2, config.hidden_size)  # two halves of each head
        found[name] = torch.stack((rows[:, 0], rows[:, 1]), 2).reshape(found[name].shape)  # side by side
    return found


def field(reader: object, name: str) -> object:
    return reader.get_field(name).contents()


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_and_sizes_are_those_that_llama_cpp_reads(tmp_path, family, dtype):
    architecture, changes = CASES[family]
    class_name, settings = {**families.FAMILIES, **families.DENSE}[family]
    theirs = families.make(class_name, settings | SIZES | changes).to(dtype)
    theirs.save_pretrained(tmp_path / "hf")
    assert ours.save(moeforge.load(tmp_path / "hf"), WORDS, tmp_path / "m.gguf", verify=True) == architecture
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    wanted = expected(theirs, pairs=architecture == "llama")
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        found = tensors[name]
        whole = tensor.ndim == 1 or "gate_inp" in name
        kind = "F32" if whole else {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        assert found.tensor_type.name == kind and list(found.shape) == [*tensor.shape][::-1], name
        stored = torch.from_numpy(found.data.copy()).view(torch.float32 if whole else dtype).view(tensor.shape)
        assert torch.equal(stored, tensor.float() if whole else tensor), name
    config = theirs.config
    keys = {
        "block_count": 2, "embedding_length": 32, "context_length": 64, "vocab_size": 304,
        "attention.head_count": 4, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }  # fmt: skip
    if family in families.FAMILIES:
        keys |= {"expert_count": 6, "expert_used_count": 2}
    assert {key: field(reader, f"{architecture}.{key}") for key in keys} == pytest.approx(keys)
    assert field(reader, "general.architecture") == architecture
    assert len(field(reader, "tokenizer.ggml.tokens")) == 304


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "llama.cpp's olmoe cannot have clip_qkv = 8.0"),
    "normalised": ("olmoe", {"norm_topk_prob": True}, "llama.cpp's olmoe cannot have norm_topk_prob = True"),
    "tied": ("olmoe", {"tie_word_embeddings": True}, "llama.cpp's olmoe cannot have tie_word_embeddings = True"),
    "mixed": (
        "qwen3_moe",
        {"norm_topk_prob": True, "mlp_only_layers": [0]},
        "cannot have layers without experts beside",
    ),
    "windows": ("mixtral", {"sliding_window": 8}, "llama.cpp's llama cannot have window = 8"),
    "not normalised": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        "llama.cpp's qwen3moe cannot have norm_topk_prob = False",
    ),
    "biases": ("llama", {"attention_bias": True}, "llama.cpp's llama cannot have attention_bias = True"),
    "stretched": ("llama", {"rope_parameters": LINEAR}, "llama cannot have rope = linear"),
    "another family": ("deepseek_v2", {}, "what can be written is llama, mixtral, olmoe, qwen3, qwen3_moe"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, what):
    family, changes, message = REFUSED[what]
    class_name, settings = {**families.FAMILIES, **families.DENSE}[family]
    families.make(class_name, settings | changes).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        ours.save(moeforge.load(tmp_path / "hf"), WORDS, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def plain(vocab_size: int) -> Decoder:
    sizes = {"vocab_size": vocab_size, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "tie_embeddings": True}
    return Decoder(ModelConfig.model_validate(sizes))


def written(path: Path, tokenizer: Tokenizer, rows: int | None = None) -> object:
    ours.save(plain(rows or tokenizer.vocab_size), tokenizer, path / "m.gguf")
    return gguf.GGUFReader(path / "m.gguf")


def test_byte_level_tokens_and_merges(tmp_path):
    end = WORDS.eos_id
    reader = written(tmp_path, WORDS, rows=end + 3)
    model = json.loads(WORDS.inner.to_str())["model"]
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert {token: index for index, token in enumerate(tokens[:end])} == model["vocab"]
    assert tokens[end:] == ["<|end|>", f"[PAD{end + 1}]", f"[PAD{end + 2}]"]
    assert field(reader, "tokenizer.ggml.token_type") == [1] * end + [3, 5, 5]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in model["merges"]]
    asked = "model pre bos_token_id eos_token_id add_bos_token add_eos_token".split()
    assert [field(reader, f"tokenizer.ggml.{key}") for key in asked] == ["gpt2", "gpt-2", end, end, False, False]


def test_bytes_are_a_byte_level_tokenizer_without_merges(tmp_path):
    reader = written(tmp_path, train_or_open(Bytes(), []))
    assert field(reader, "tokenizer.ggml.merges") == [""]  # llama.cpp wants a list, this merge never happens
    assert field(reader, "tokenizer.ggml.tokens")[ord("a")] == "a"


def test_sentencepiece_scores_are_in_the_order_of_merges(tmp_path):
    pieces = [(-float(rank), piece) for rank, piece in enumerate(["b", "a", " ", "aa", "ab", "aba", " a", "é"])]
    twin.write_tokenizer(tmp_path / "tok267.bin", pieces)
    sizes = (16, 24, 1, 4, 2, -267, 32)
    model, tokenizer = llama2c.load(twin.write_weights(tmp_path / "w.bin", sizes, twin.random_tensors(sizes)))
    ours.save(model, tokenizer, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, scores = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.scores")
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and tokens[259:262] == ["b", "a", "▁"]
    assert scores[262:266] == [0, -1, -2, -3]
    assert field(reader, "tokenizer.ggml.token_type") == [2, 3, 3] + [6] * 256 + [1] * 8
    asked = "model bos_token_id eos_token_id unknown_token_id add_bos_token add_space_prefix".split()
    assert [field(reader, f"tokenizer.ggml.{key}") for key in asked] == ["llama", 1, 2, 0, True, True]


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(change: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_str(WORDS.inner.to_str())
    cut = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")  # noqa: E731
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match change:
        case "qwen2":
            inner.normalizer = normalizers.NFC()
            inner.pre_tokenizer = pre_tokenizers.Sequence([cut(QWEN), after])
        case "llama-bpe":
            inner.pre_tokenizer = pre_tokenizers.Sequence([cut(QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), after])
            inner.model.ignore_merges = True
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        case "unknown pattern":
            inner.pre_tokenizer = pre_tokenizers.Sequence([cut(r"\w+"), after])
        case "prefix":
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "lower case":
            inner.normalizer = normalizers.Lowercase()
        case "merges as they are":
            inner.pre_tokenizer = pre_tokenizers.Sequence([cut(QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), after])
    return inner


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "smollm"])
def test_how_a_text_is_cut_has_a_name(tmp_path, name):
    reader = written(tmp_path, Tokenizer(byte_level(name), WORDS.eos_id))
    assert field(reader, "tokenizer.ggml.pre") == name


@pytest.mark.parametrize("change", ["unknown pattern", "prefix", "lower case", "merges as they are"])
def test_how_llama_cpp_would_not_cut_it_is_refused(tmp_path, change):
    with pytest.raises(UserError, match=r"no GGUF for this tokenizer: llama\.cpp has no name for"):
        written(tmp_path, Tokenizer(byte_level(change), WORDS.eos_id))
    assert not any(tmp_path.iterdir())


def test_other_models_of_words_are_refused(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(UserError, match=r"its model is WordLevel, llama\.cpp runs BPE here"):
        written(tmp_path, Tokenizer(inner, 1))


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([("a", "b"), ("b", "a"), ("ab", "a")], "its merges leave out 'a' \\+ 'ba'"),
        ([("ab", "a"), ("a", "b"), ("a", "ba"), ("b", "a")], "its merges come back to 'aba'"),
    ],
)
def test_merges_that_are_not_sentencepieces_are_refused(tmp_path, merges, message):
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "ab": 3, "ba": 4, "aba": 5, "▁": 6}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(UserError, match=message):
        written(tmp_path, Tokenizer(inner, 0))


def test_types_that_gguf_has_no_plain_name_for_are_refused(tmp_path):
    with pytest.raises(UserError, match="written from bf16, fp16 or fp32"):
        ours.save(plain(300).double(), WORDS, tmp_path / "m.gguf")


def test_the_chat_template_goes_along(tmp_path):
    class_name, settings = families.DENSE["llama"]
    families.make(class_name, settings | SIZES).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    ours.save(moeforge.load(tmp_path / "hf"), WORDS, tmp_path / "m.gguf")
    assert field(gguf.GGUFReader(tmp_path / "m.gguf"), "tokenizer.chat_template") == "{{ messages }}"
