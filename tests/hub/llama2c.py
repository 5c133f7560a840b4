"""llama2.c in plain Python: it writes its two files, encodes as its tokenizer does, and runs as ``run.c`` does."""

import struct
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int, int]
Piece = tuple[float, str]

FIXED: list[Piece] = [(0.0, name) for name in ("<unk>", "\n<s>\n", "\n</s>\n", *map("<0x{:02X}>".format, range(256)))]
"""What every tokenizer begins with."""


def random_tensors(sizes: Sizes) -> list[Tensor]:
    """In the order of the file, tables of rotations included; layers stacked."""
    d_model, d_ff, layers, heads, key_heads, vocab, context = sizes
    size = d_model // heads
    square, keys = (layers, d_model, d_model), (layers, key_heads * size, d_model)
    shapes = [(abs(vocab), d_model), (layers, d_model), square, keys, keys, square, (layers, d_model)]
    shapes += [(layers, d_ff, d_model), (layers, d_model, d_ff), (layers, d_ff, d_model), (d_model,)]
    shapes += [(context, size // 2)] * 2 + [(-vocab, d_model)] * (vocab < 0)
    return [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]


def write_weights(path: Path, sizes: Sizes, tensors: list[Tensor]) -> Path:
    """A file of the first format."""
    words = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    path.write_bytes(struct.pack("<7i", *sizes) + words)
    return path


def write_tokenizer(path: Path, pieces: list[Piece]) -> Path:
    """A file of ``FIXED`` and ``pieces``."""
    data = struct.pack("<i", 7)
    for score, piece in FIXED + pieces:
        text = piece.encode()
        data += struct.pack("<fi", score, len(text)) + text
    path.write_bytes(data)
    return path


def read_pieces(path: Path) -> list[Piece]:
    """Of a whole file, by id."""
    data, place, pieces = path.read_bytes(), 4, []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        pieces.append((score, data[place + 8 : place + 8 + length].decode()))
        place += 8 + length
    return pieces


def encode(pieces: list[Piece], text: str) -> list[int]:
    """A space in front, characters or their bytes, then the best pair again and again, the leftmost of equal ones."""
    known = {piece: token for token, (_, piece) in enumerate(pieces)}
    ids: list[int] = [known[" "]] if text else []
    for character in text:
        ids += [known[character]] if character in known else [byte + 3 for byte in character.encode()]
    while True:
        joined = [known.get(pieces[left][1] + pieces[right][1]) for left, right in pairwise(ids)]
        found = [(-pieces[token][0], place, token) for place, token in enumerate(joined) if token is not None]
        if not found:
            return ids
        _, place, token = min(found)
        ids[place : place + 2] = [token]


def logits(sizes: Sizes, tensors: list[Tensor], ids: list[int]) -> Tensor:
    """[L, V], head by head and position by position."""
    _, _, layers, heads, key_heads, vocab, _ = sizes
    table, norm_a, wq, wk, wv, wo, norm_m, gate, down, up, norm, _, _ = tensors[:13]
    output, x = tensors[13] if vocab < 0 else table, table[ids]
    for layer in range(layers):
        row = _rms(x, norm_a[layer])
        queries, keys = _turn(row @ wq[layer].T, heads), _turn(row @ wk[layer].T, key_heads)
        values = (row @ wv[layer].T).unflatten(1, (key_heads, -1))
        mixed = torch.zeros_like(queries)
        for head in range(heads):
            shared = head * key_heads // heads
            for here in range(len(ids)):
                scores = keys[: here + 1, shared] @ queries[here, head] / keys.shape[2] ** 0.5
                mixed[here, head] = scores.softmax(0) @ values[: here + 1, shared]
        x = x + mixed.flatten(1) @ wo[layer].T
        row = _rms(x, norm_m[layer])
        x = x + (torch.nn.functional.silu(row @ gate[layer].T) * (row @ up[layer].T)) @ down[layer].T
    return _rms(x, norm) @ output.T


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _turn(rows: Tensor, heads: int) -> Tensor:
    """Neighbouring values as complex numbers, turned by position / 10000^(i / head_dim)."""
    pairs = torch.view_as_complex(rows.unflatten(1, (heads, -1, 2)).contiguous())
    speed = 10000.0 ** (-torch.arange(0, 2 * pairs.shape[2], 2) / (2 * pairs.shape[2]))
    angle = torch.arange(len(rows))[:, None, None] * speed
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(2)
