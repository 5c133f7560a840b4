"""A decoder layer of the usual parts in one call: the structures of ``decoder.cpp`` and ``paged.h``."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeforge.kernels.native import engine
from moeforge.kernels.native.quantised import PackedWeight

POINTERS = ctypes.c_void_p
SCORES = {"softmax": 0, "sigmoid": 1, "logits": 2}


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class Paged(ctypes.Structure):
    """``struct Paged`` of ``paged.h``."""

    _fields_ = (
        *_fields(POINTERS, "queries_in keys values sinks text table position"),
        ("scale", ctypes.c_float),
        *_fields(ctypes.c_int32, "rows queries heads width value_width key_stride value_stride"),
        *_fields(ctypes.c_int32, "block_size table_width threads"),
        ("window", ctypes.c_int64),
    )


class Matrix(ctypes.Structure):
    """``struct Matrix``: of the model's type, or quantised; none where ``data`` is null."""

    _fields_ = (*_fields(POINTERS, "data bias"), *_fields(ctypes.c_int32, "out in_ quantised"))


class Mlp(ctypes.Structure):
    """``struct Mlp``."""

    _fields_ = (("gate_up", Matrix), ("down", Matrix), *_fields(ctypes.c_int32, "pointwise gated"))


class DecoderLayer(ctypes.Structure):
    """``struct DecoderLayer``."""

    _fields_ = (
        *_fields(POINTERS, "attention_norm q_norm k_norm mlp_norm"),
        *_fields(Matrix, "q k v o"),
        ("paged", Paged),
        ("router", Matrix),
        *_fields(POINTERS, "selection_bias up down"),
        ("mlp", Mlp),
        ("mlp_gate", Matrix),
        *_fields(ctypes.c_float, "eps residual_scale weight_scale min_total clip"),
        *_fields(ctypes.c_int32, "d_model rotary_width interleaved whole_norm score normalize softmax_chosen top_k"),
        *_fields(ctypes.c_int32, "experts d_expert pointwise gated quantised bf16 skip groups top_groups ranking"),
        ("as_bytes", ctypes.c_int32),
    )


class _Rows(ctypes.Structure):
    """``struct Rows``."""

    _fields_ = (
        *_fields(POINTERS, "text table position slot cos sin"),
        *_fields(ctypes.c_int32, "rows table_width threads"),
    )


@dataclass(frozen=True)
class Pass:
    """What the rows of one pass have in common in all layers: made once, its tensors held."""

    rows: _Rows
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: Any, cos_TW: Tensor, sin_TW: Tensor) -> "Pass":
        """``rows`` as in ``kernels/paged.py``; rotations [T, W] float32."""
        held = tuple(t.contiguous() for t in (rows.text, rows.table, rows.position, rows.slot, cos_TW, sin_TW))
        made = _Rows(*(t.data_ptr() for t in held), len(rows.text), rows.table.shape[1], torch.get_num_threads())
        return cls(made, held)


class Layers:
    """Several layers, one after the other in one call."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        """``layers`` must live as long as this."""
        self._layers = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(layer) for layer in layers))
        self._top_k = [layer.top_k for layer in layers]
        self._experts = [layer.experts for layer in layers]
        self._call = engine.open_library().moeforge_decoder_layers

    def run(self, rows: Pass, x_TD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Changes x in place. Returns of each layer ids [T, K] int32, best first, and ends [E] int32; empty without
        experts."""
        most_k, most_experts, count = max(self._top_k), max(self._experts), len(self._top_k)
        ids, ends = (
            torch.empty(shape, dtype=torch.int32) for shape in ((count, len(x_TD) * most_k), (count, most_experts))
        )
        where = ctypes.c_void_p(x_TD.data_ptr()), ctypes.c_void_p(ids.data_ptr())
        done = self._call(
            self._layers, count, ctypes.byref(rows.rows), *where, most_k, ctypes.c_void_p(ends.data_ptr()), most_experts
        )
        engine.check(done)
        taken = zip(ids, ends, self._top_k, self._experts, strict=True)
        return [(i[: len(x_TD) * k].view(-1, k) if k else i[:0].view(len(x_TD), 0), e[:n]) for i, e, k, n in taken]


def matrix(weight: Tensor | PackedWeight, bias: Tensor | None, held: list[Any]) -> Matrix:
    """A matrix for C++; what it points to is put into ``held``."""
    bias = None if bias is None else bias.detach().float().contiguous()
    held.append(bias)
    where = None if bias is None else bias.data_ptr()
    if not isinstance(weight, Tensor):
        held.append(weight)
        return Matrix(ctypes.addressof(weight.matrices), where, *weight.shape, 1)
    weight = weight.detach().contiguous()
    held.append(weight)
    return Matrix(weight.data_ptr(), where, *weight.shape, 0)
