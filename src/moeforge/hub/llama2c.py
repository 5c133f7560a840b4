"""Files of llama2.c (github.com/karpathy/llama2.c): ``*.bin`` weights of its first format, and its tokenizer beside.

Weights: seven int32 (width, MLP width, layers, heads, key heads, vocabulary, context; a negative vocabulary means an
output matrix of its own), then float32 tensors, each for all layers together, with rotary pairs side by side.
Tokenizer: int32 longest piece, then for each piece float32 score, int32 length, bytes.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, processors
from torch import Tensor

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.rotary import halved
from moeforge.models import Decoder, ModelConfig

HEADER = ("d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "max_seq_len")
Sizes = dict[str, int]
VERSIONED = 0x616B3432
"""First word of the later formats ("ak42"), which put a version where this one has its sizes."""
UNKNOWN, START, END = "<unk>", "<s>", "</s>"
FIRST_BYTE, FIRST_PIECE = 3, 259
"""Ids: the three special tokens, the 256 bytes, then the pieces."""


def load(path: Path, tokenizer: Path | None = None, dtype: torch.dtype | None = None) -> tuple[Decoder, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer: ``tokenizer``, or the one that lies beside it.

    ``dtype`` None is float32, as in the file.

    Raises UserError for a file that is not one of these, is cut short or too long, or does not fit the other.
    """
    sizes = _sizes(path)
    vocabulary = abs(sizes["vocab_size"])
    pieces = _pieces(tokenizer or _beside(path, vocabulary))
    if len(pieces) != vocabulary:
        raise UserError(f"{path}: the model has {vocabulary} tokens, its tokenizer {len(pieces)}")
    tied = sizes["vocab_size"] > 0
    config = ModelConfig.model_validate({**sizes, "vocab_size": vocabulary, "tie_embeddings": tied})
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in _tensors(path, sizes)}, assign=True)
    return model.eval(), _tokenizer(pieces)


def _sizes(path: Path) -> Sizes:
    """What the file begins with, once it is sure that the rest of the file is as long as that says."""
    try:
        with path.open("rb") as file:
            head = file.read(4 * len(HEADER))
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if head[:4] == struct.pack("<I", VERSIONED):
        raise UserError(f"{path} is a later format of llama2.c: export it with --version 0")
    words = struct.unpack(f"<{len(HEADER)}i", head) if len(head) == 4 * len(HEADER) else (0,) * len(HEADER)
    sizes = dict(zip(HEADER, words, strict=True))
    heads, key_heads = max(1, sizes["num_heads"]), max(1, sizes["num_kv_heads"])
    positive = all(size > 0 or (name == "vocab_size" and size) for name, size in sizes.items())
    if not positive or sizes["d_model"] % heads or heads % key_heads:
        raise UserError(f"{path} holds no weights of llama2.c: it does not begin with the sizes of a model")
    expected = 4 * (len(HEADER) + sum(map(math.prod, _layout(sizes).values())))
    if found != expected:
        raise UserError(f"{path} has {found:,} bytes, but the sizes that it begins with ask for {expected:,}")
    return sizes


def _layout(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the file, in order."""
    d_model, d_ff, layers, heads, key_heads, vocabulary, context = sizes.values()
    size = d_model // heads
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (abs(vocabulary), d_model),
        "attention_norm": (layers, d_model),
        "q_proj": (layers, d_model, d_model),
        "k_proj": (layers, key_heads * size, d_model),
        "v_proj": (layers, key_heads * size, d_model),
        "o_proj": (layers, d_model, d_model),
        "mlp_norm": (layers, d_model),
        "gate": (layers, d_ff, d_model),
        "down": (layers, d_model, d_ff),
        "up": (layers, d_ff, d_model),
        "norm": (d_model,),
        "cos": (context, size // 2),
        "sin": (context, size // 2),
    }
    return shapes if vocabulary > 0 else shapes | {"output": (-vocabulary, d_model)}


def _tensors(path: Path, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Our names and layout. The tables of rotations are left: they follow from the sizes."""
    shapes = _layout(sizes)
    lengths = [math.prod(shape) for shape in shapes.values()]
    words = torch.from_file(str(path), shared=False, size=len(HEADER) + sum(lengths))[len(HEADER) :]
    file = {name: part.view(shapes[name]) for name, part in zip(shapes, words.split(lengths), strict=True)}
    yield "embedding.weight", file["embedding"]
    yield "norm.weight", file["norm"]
    if "output" in file:
        yield "output.weight", file["output"]
    for layer in range(sizes["num_layers"]):
        name = f"blocks.{layer}"
        yield f"{name}.attention_norm.weight", file["attention_norm"][layer]
        yield f"{name}.attention.q_proj.weight", halved(file["q_proj"][layer], sizes["num_heads"])
        yield f"{name}.attention.k_proj.weight", halved(file["k_proj"][layer], sizes["num_kv_heads"])
        yield f"{name}.attention.v_proj.weight", file["v_proj"][layer]
        yield f"{name}.attention.o_proj.weight", file["o_proj"][layer]
        yield f"{name}.mlp_norm.weight", file["mlp_norm"][layer]
        yield f"{name}.mlp.gate_up_proj.weight", torch.cat((file["gate"][layer], file["up"][layer]))
        yield f"{name}.mlp.down_proj.weight", file["down"][layer]


def _beside(path: Path, vocabulary: int) -> Path:
    """The tokenizer under the names that llama2.c's scripts give it."""
    names = (f"tok{vocabulary}.bin", "tokenizer.bin")
    for name in names:
        if (found := path.with_name(name)).is_file():
            return found
    raise UserError(f"{path} needs its tokenizer: none of {', '.join(names)} lies beside it; name it with --tokenizer")


def _pieces(path: Path) -> list[tuple[float, str]]:
    """(score, piece) by id."""
    pieces, place = [], 4
    try:
        data = path.read_bytes()
        while place < len(data):
            score, length = struct.unpack_from("<fi", data, place)
            place += 8 + length
            if length < 0 or place > len(data):
                raise ValueError(f"piece {len(pieces)} is {length} bytes long")
            pieces.append((score, data[place - length : place].decode("utf-8")))
    except (OSError, struct.error, ValueError) as error:
        raise UserError(f"{path} is no tokenizer of llama2.c, or is cut short ({error})") from error
    bytes_of = [piece for _, piece in pieces[FIRST_BYTE:FIRST_PIECE]]
    if bytes_of != [f"<0x{byte:02X}>" for byte in range(256)] or len({piece for _, piece in pieces}) < len(pieces):
        raise UserError(f"{path} is no tokenizer of llama2.c: ids 3 to 258 are not the bytes, or a piece comes twice")
    return pieces


def _tokenizer(pieces: list[tuple[float, str]]) -> Tokenizer:
    """The same encoding from the ``tokenizers`` library: best score first is a rank for every pair that makes a piece.

    As in all ports of sentencepiece models, U+2581 in a text reads as the space that it stands for in the vocabulary.
    """
    names = [UNKNOWN, START, END, *(piece.replace(" ", "▁") for _, piece in pieces[FIRST_BYTE:])]
    vocabulary = {name: token for token, name in enumerate(names)}
    best_first = sorted(range(FIRST_PIECE, len(names)), key=lambda token: -pieces[token][0])
    splits = ((names[token][:cut], names[token][cut:]) for token in best_first for cut in range(1, len(names[token])))
    merges = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    inner.add_special_tokens([UNKNOWN, START, END])
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.post_processor = processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, vocabulary[START])])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return Tokenizer(inner, vocabulary[END])
