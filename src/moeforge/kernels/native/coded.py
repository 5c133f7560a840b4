"""Ternary weights in less than a bit each, where most are zero: 16-bit words for whole runs of them (QMoE, 2310.16795).

A dictionary holds the 2^16 likeliest runs of 1 to 14 pairs, were weights independent and zero with probability
``zeros``, minus or plus one alike. All beginnings of a run are likelier than it and so there too: a row is cut
greedily, each time into the longest run that the dictionary has, and words never reach over its end. With 88.5 % zeros
a word stands for 22 weights. For a weight [..., out, in], ``in`` padded with zeros to blocks of 128:

- ``words`` [..., most] int16 (the bits of uint16): those of all rows of a matrix, one row after the other; a matrix of
  fewer words than another ends in zeros.
- ``ends`` [..., out] int32: where a row's words end, counted from the first word of its matrix [out, in].
- ``scales`` [..., out] float16: one per row, what a one stands for.

The values of a row come in the order of the bytes of 2 bits that ``formats.py`` describes, lowest bits first. An entry
of the dictionary is 64 bits: the values plus one, two bits each, lowest first, and from bit 56 on its number of pairs.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from moeforge.errors import UserError
from moeforge.kernels.native import engine
from moeforge.kernels.native.formats import BLOCK, in_order, to_order
from moeforge.kernels.native.quantised import Copied, Matrix, array

WORDS, PAIRS = 1 << 16, 14
LENGTH = 56
"""The bit of an entry from which its number of pairs stands."""
RATE, ZEROS = 7 / 8, 0.8
"""In folders: bits of words for each weight, at most, and the ``zeros`` of all of them."""
VALUES = BLOCK // 4
"""Bytes of a block as two bits a value."""
LIKELY = (0.34, 0.99)
"""What ``zeros`` may be: in between, every single pair is among the 2^16."""


@dataclass(frozen=True)
class Dictionary:
    """The runs that words stand for, and the way to find them."""

    entries: Tensor
    """[2^16] int64: a word's values and how many pairs they are."""
    longer: Tensor
    """[2^16 + 1, 9] int32: the word for a word's run and one pair more, -1 where there is none; the last row begins."""

    @cached_property
    def pairs(self) -> Tensor:
        """[2^16] int64: pairs of each word."""
        return self.entries >> LENGTH


@lru_cache(8)
def dictionary(zeros: float) -> Dictionary:
    """The 2^16 likeliest runs where a value is zero with probability ``zeros``; a shorter run first among equals."""
    rank = _ranks(zeros)
    pair = torch.arange(9)
    low, high = pair % 3, pair // 3
    bits, nonzero = low | high << 2, (low != 1).long() + (high != 1).long()
    runs: list[tuple[Tensor, ...]] = []
    values, count, own = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([-1])
    total = 0
    for length in range(PAIRS):
        grown, counts = values[:, None] | bits << 4 * length, count[:, None] + nonzero
        ranks = rank[length, counts]
        likely = ranks < len(rank) * rank.shape[1]
        before, last = own[:, None].expand_as(grown)[likely], pair.expand_as(grown)[likely]
        values, count = grown[likely], counts[likely]
        own = total + torch.arange(len(values))
        total += len(values)
        runs.append((values | (length + 1) << LENGTH, ranks[likely], before, last))
    entries, ranks, before, last = (torch.cat(parts) for parts in zip(*runs, strict=True))
    first = ranks.argsort(stable=True)[:WORDS]
    word = torch.full((total + 1,), WORDS)  # the last one: where a run begins
    word[first] = torch.arange(WORDS)
    longer = torch.full((WORDS + 1, 9), -1, dtype=torch.int32)
    longer[word[before[first]], last[first]] = torch.arange(WORDS, dtype=torch.int32)
    return Dictionary(entries[first].contiguous(), longer)


def _ranks(zeros: float) -> Tensor:
    """[pairs - 1, values that are not zero]: place in the order of probability of all runs alike in both; a number past
    all places where none of them can be among the first 2^16."""
    zero, other = math.log(zeros), math.log((1 - zeros) / 2)
    kinds = [(length, count) for length in range(1, PAIRS + 1) for count in range(2 * length + 1)]
    kinds.sort(key=lambda kind: (-(2 * kind[0] - kind[1]) * zero - kind[1] * other, kind))
    rank = torch.full((PAIRS, 2 * PAIRS + 1), PAIRS * (2 * PAIRS + 1))
    runs = 0
    for place, (length, count) in enumerate(kinds):
        if runs >= WORDS:
            break
        rank[length - 1, count] = place
        runs += math.comb(2 * length, count) << count
    return rank


@dataclass(frozen=True)
class CodedWeight(Copied):
    """A weight [..., out, in] in the format that the module describes."""

    words: Tensor
    ends: Tensor
    scales: Tensor
    zeros: float
    """Of which dictionary the words are."""
    shape: tuple[int, ...]
    """Of the weight that it stands for."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory, less the dictionary's, which all have in common."""
        return self.words.nbytes + self.ends.nbytes + self.scales.nbytes

    @cached_property
    def dictionary(self) -> Dictionary:
        """The runs that the words stand for."""
        return dictionary(self.zeros)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.words.device

    @property
    def group(self) -> int:
        """Inputs that share a scale, in rows that go to int8 as well: a row's one serves every block."""
        return BLOCK

    @cached_property
    def matrices(self) -> ctypes.Array[Matrix]:
        """What the C++ reads."""
        entries = engine.pointer(self.dictionary.entries)
        sizes = 0, BLOCK, self.shape[-2], -(-self.shape[-1] // BLOCK)
        own = zip(self.words, self.scales, self.ends, strict=True)
        stack = own if len(self.shape) > 2 else [(self.words, self.scales, self.ends)]
        return array([Matrix(*(engine.pointer(tensor) for tensor in one), entries, *sizes) for one in stack])

    def dequantise(self) -> Tensor:
        """[..., out, in] float32: what the words stand for."""
        used = torch.arange(self.words.shape[-1]) < self.ends[..., -1:]
        words, made = self.words[used].long() & (WORDS - 1), self.dictionary
        pairs = made.pairs[words]
        within = torch.arange(int(pairs.sum())) - (pairs.cumsum(0) - pairs).repeat_interleave(pairs)
        entries = made.entries[words].repeat_interleave(pairs) >> 4 * within
        nibbles = (entries & 15).to(torch.uint8).view(*self.shape[:-1], -1, VALUES, 2)
        fields = torch.stack([nibbles & 3, nibbles >> 2], -1).flatten(-2)  # [..., blocks, bytes, 4]
        codes = in_order(fields.transpose(-1, -2).flatten(-3))[..., : self.shape[-1]]
        return (codes.float() - 1) * self.scales.float()[..., None]


def encode(weight: Tensor) -> CodedWeight:
    """[..., out, in], each row rounded to nothing or, with a sign, to its largest magnitude: where it is made of those
    already, nothing is lost. Raises UserError for weights that are not finite or too large for a scale."""
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be coded")
    scales = weight.detach().float().abs().amax(-1).to(torch.float16)
    if not bool(scales.isfinite().all()):
        raise UserError("a weight is too large for a float16 scale")
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, weight.detach().float() / steps, 0).round().clamp(-1, 1).to(torch.int8)
    zeros = round(min(max(float((codes == 0).float().mean()), LIKELY[0]), LIKELY[1]), 2)
    return coded(codes, scales, zeros)


def coded(codes: Tensor, scales: Tensor, zeros: float) -> CodedWeight:
    """Codes [..., out, in] int8 from -1 to 1 and scales [..., out] float16, in words for ``zeros``."""
    stored = to_order(F.pad(codes + 1, (0, -codes.shape[-1] % BLOCK), value=1))
    fields = stored.unflatten(-1, (-1, 4, VALUES)).transpose(-1, -2).flatten(-3)  # [..., values as they come]
    words, ends = _cut(fields.flatten(0, -2), dictionary(zeros).longer)
    ends = ends.view(*codes.shape[:-1])
    last = ends[..., -1].flatten()
    starts = F.pad(last, (1, 0))[:-1]
    own = [words[start:end] for start, end in zip(starts.tolist(), last.tolist(), strict=True)]
    together = pad_sequence(own, batch_first=True).view(*codes.shape[:-2], -1)
    ends = (ends - starts.view(*codes.shape[:-2], 1)).to(torch.int32)
    return CodedWeight(together, ends, scales, zeros, tuple(codes.shape))


def stack(parts: Sequence[CodedWeight]) -> CodedWeight:
    """Stacks of the same shape and number of words, one after the other."""
    words, ends, scales = (torch.cat([getattr(p, name) for p in parts]) for name in ("words", "ends", "scales"))
    return CodedWeight(words, ends, scales, parts[0].zeros, (len(words), *parts[0].shape[1:]))


def capacity(rows: int, width: int) -> int:
    """Words that a matrix [rows, width] has in a folder."""
    return math.ceil(RATE * rows * -(-width // BLOCK) * BLOCK / 16)


def _cut(values_RV: Tensor, longer: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, V] of 0 to 2 into words [all] and their ends [R] int64: all rows a pair at a time."""
    pairs = (values_RV[:, ::2] + 3 * values_RV[:, 1::2]).long().T
    word = longer.new_full((values_RV.shape[0],), WORDS).long()
    done = torch.full((len(pairs), len(word)), -1, dtype=torch.int32)
    for at, pair in enumerate(pairs):
        grown = longer[word, pair].long()
        ended = grown < 0
        done[at] = torch.where(ended, word, -1)
        word = torch.where(ended, longer[WORDS, pair], grown)
    words = torch.cat([done, word[None].int()]).T
    kept = words >= 0
    return words[kept].to(torch.int16), kept.sum(1).cumsum(0)
