"""The engine's passes: torch tensors in and out of the C++ of ``experts.cpp``.

The pre-activation that forward returns has the shape [N, width] but its own order: per block of tokens [width,
tokens], which only ``backward`` here reads.
"""

import ctypes
from typing import get_args

import torch
from torch import Tensor

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels.activation import is_gated
from moeforge.kernels.compiled import constant
from moeforge.kernels.edges import Edges, EdgeTensors
from moeforge.kernels.native.build import library, processor
from moeforge.kernels.reference import reference

POINTWISE = {"swiglu": 0, "silu": 0, "geglu": 1, "gelu": 1, "relu": 2}
"""Activation to its number in ``activation.h``."""
TYPES = (torch.float32, torch.bfloat16)

_Operands = tuple[Tensor, Edges, Tensor, Tensor, Activation]
"""x [T, D], edges, up, down and the activation's name."""
_POINTERS = "x up down token weight ends".split()
_SIZES = "tokens edges".split()
_COUNTS = "experts d_model d_expert pointwise gated threads".split()


class _Layer(ctypes.Structure):
    """``struct Layer`` of ``layer.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _COUNTS),
    )


def why_not(x_TD: Tensor, up_EHD: Tensor, down_EDH: Tensor) -> str | None:
    """The reason the engine cannot run these operands here, or None. The first call builds the library."""
    if x_TD.device.type != "cpu":
        return f"it runs on a CPU, not on {x_TD.device.type}"
    if x_TD.dtype not in TYPES:
        return f"it has no {x_TD.dtype}"
    return missing()


@constant
def missing() -> str | None:
    """Why there is no library on this machine, or None."""
    found = library(_wrong_anywhere)
    return found if isinstance(found, str) else None


def unmeasured(x_TD: Tensor) -> str | None:
    """Why ``auto`` leaves operands that could run to torch: nobody has timed the engine on such a processor yet."""
    return _bf16_unmeasured() if x_TD.dtype == torch.bfloat16 else None


@constant
def _bf16_unmeasured() -> str | None:
    timed = {"avx512_bf16", "amx_bf16"} & processor()
    return None if timed else "its bf16 products have not been timed on a processor without AVX-512 bf16"


def forward(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Returns y [T, D] and the pre-activation z [N, H or 2H], in this engine's order."""
    z_NH = x_TD.new_empty(len(edges.token), up_EHD.shape[1])
    return _forward(open_library(), (x_TD, edges, up_EHD, down_EDH, activation), z_NH), z_NH


def infer(x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation) -> Tensor:
    """y alone: the same bits as ``forward``'s, with nothing written for a backward pass."""
    return _forward(open_library(), (x_TD, edges, up_EHD, down_EDH, activation))


def backward(
    dy_TD: Tensor, x_TD: Tensor, z_NH: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, combine weight, up and down."""
    return _backward(open_library(), (x_TD, edges, up_EHD, down_EDH, activation), dy_TD, z_NH)


def open_library() -> ctypes.CDLL:
    """The library. Raises UserError where there is none."""
    found = library(_wrong_anywhere)
    if isinstance(found, str):
        raise UserError(f"engine 'native' cannot run here: {found}. Use engine=streaming")
    return found


def end_workers() -> None:
    """Ends the threads that the calling one computes with (OpenMP's); its next call starts new ones.

    For a thread that hands its work to another: while a process has more such threads than cores, they sleep after each
    call, and waking up took 6 of the 14 milliseconds of a pass for one token.
    """
    if missing() is None:
        open_library().moeforge_end_workers()


def _forward(lib: ctypes.CDLL, operands: _Operands, z_NH: Tensor | None = None) -> Tensor:
    x_TD, edges, _, down_EDH, _ = operands
    layer, held = _layer(*operands)
    y_TD = x_TD.new_empty(edges.num_tokens, x_TD.shape[1])
    hidden = _panels(lib, layer, x_TD, down_EDH.shape[2])
    status = lib.moeforge_forward(ctypes.byref(layer), _is_bf16(x_TD), address(y_TD), address(z_NH), address(hidden))
    del held  # alive until here, as what the addresses point to
    check(status)
    return y_TD


def _backward(
    lib: ctypes.CDLL, operands: _Operands, dy_TD: Tensor, z_NH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_TD, edges, up_EHD, down_EDH, _ = operands
    layer, held = _layer(*operands)
    dy_TD, z_NH = dy_TD.to(x_TD.dtype).contiguous(), z_NH.contiguous()
    dx_TD, dup_EHD, ddown_EDH = (x_TD.new_empty(like.shape) for like in (x_TD, up_EHD, down_EDH))
    dweight_N = x_TD.new_zeros(len(edges.weight), dtype=torch.float32)  # of edges past the last end nobody writes
    dz_NH, weighted_NH = torch.empty_like(z_NH), x_TD.new_empty(len(z_NH), down_EDH.shape[2])
    panels = _panels(lib, layer, x_TD, up_EHD.shape[1] + 2)
    outputs = dx_TD, dweight_N, dup_EHD, ddown_EDH, dz_NH, weighted_NH, panels
    status = lib.moeforge_backward(
        ctypes.byref(layer), _is_bf16(x_TD), address(dy_TD), address(z_NH), *(address(tensor) for tensor in outputs)
    )
    del held
    check(status)
    return dx_TD, dweight_N.to(edges.weight.dtype), dup_EHD, ddown_EDH


def _layer(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[_Layer, list[Tensor]]:
    num_experts, d_model, d_expert = down_EDH.shape
    width = d_expert * (1 + is_gated(activation))
    if up_EHD.shape != (num_experts, width, d_model) or x_TD.shape != (edges.num_tokens, d_model):
        shapes = f"x {tuple(x_TD.shape)}, up {tuple(up_EHD.shape)} and down {tuple(down_EDH.shape)}"
        raise UserError(f"{shapes} do not fit each other for {activation} over {edges.num_tokens} tokens")
    layer, held = layer_of(x_TD, edges, tuple(down_EDH.shape), activation)
    matrices = [up_EHD.contiguous(), down_EDH.contiguous()]
    layer.up, layer.down = (pointer(matrix) for matrix in matrices)
    return layer, held + matrices


def layer_of(
    x_TD: Tensor, edges: Edges, down_shape: tuple[int, ...], activation: Activation
) -> tuple[_Layer, list[Tensor]]:
    """The C structure without its matrices, and the contiguous tensors that must live as long as it.

    Raises UserError where the route is not over so many experts.
    """
    num_experts, d_model, d_expert = down_shape
    if len(edges.ends) != num_experts:
        raise UserError(f"the route has {len(edges.ends)} experts, the weights have {num_experts}")
    held = [x_TD.detach().contiguous(), edges.token.to(torch.int64).contiguous()]
    held += [edges.weight.detach().to(torch.float32).contiguous(), edges.ends.to(torch.int32).contiguous()]
    layer = _Layer(tokens=edges.num_tokens, edges=len(edges.token), threads=torch.get_num_threads())
    layer.x, layer.token, layer.weight, layer.ends = (pointer(tensor) for tensor in held)
    layer.experts, layer.d_model, layer.d_expert = num_experts, d_model, d_expert
    layer.pointwise, layer.gated = POINTWISE[activation], is_gated(activation)
    return layer, held


def _panels(lib: ctypes.CDLL, layer: _Layer, x_TD: Tensor, rows: int) -> Tensor:
    lib.moeforge_panel_words.restype = ctypes.c_int64
    words = lib.moeforge_panel_words(ctypes.byref(layer), rows, _is_bf16(x_TD))
    if words < 0:
        check(-words)
    return x_TD.new_empty(words, dtype=torch.float32)


def pointer(tensor: Tensor) -> int:
    """To the first value. Raises UserError for what C++ cannot read: it would end the process."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        where = f"{tuple(tensor.shape)} on {tensor.device}"
        raise UserError(f"engine 'native' reads contiguous tensors on the CPU, and was given one of {where}")
    return tensor.data_ptr()


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of the first value; null for None."""
    return ctypes.c_void_p(None if tensor is None else pointer(tensor))


def _is_bf16(x_TD: Tensor) -> int:
    return int(x_TD.dtype == torch.bfloat16)


def check(status: int) -> None:
    """Raises UserError where a pass refused its edges, MemoryError where it found no memory to work in."""
    if status == 1:
        raise UserError("the route names a token or an edge that is not there: do its ends rise, and fit its tokens?")
    if status:
        raise MemoryError("no memory for the experts' pass: fewer tokens at a time or fewer threads need less")


def _wrong_anywhere(lib: ctypes.CDLL) -> str | None:
    """``_wrong``, and the same for weights in few bits."""
    from moeforge.kernels.native import quantised  # which imports this file

    with torch.device("cpu"), torch.inference_mode(), torch.autocast("cpu", enabled=False):
        return _wrong(lib) or quantised.wrong(lib)


def _wrong(lib: ctypes.CDLL) -> str | None:
    """What a new library computes that the reference does not, or None: ragged sizes, every activation, both types,
    with and without the kept pre-activation, and gradients; whatever modes the caller is in."""
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            for activation in get_args(Activation):
                wrong = _differs(lib, activation, dtype, tolerance, generator)
                if wrong:
                    return f"{wrong} for {activation} in {dtype}"
    return None


def _differs(
    lib: ctypes.CDLL, activation: Activation, dtype: torch.dtype, tolerance: float, generator: torch.Generator
) -> str | None:
    shapes = (23, 37), (3, 21 * (1 + is_gated(activation)), 37), (3, 37, 21), (23, 37), (70,)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
    x_TD, up_EHD, down_EDH, dy_TD = (tensor.to(dtype) for tensor in drawn[:4])
    edges = EdgeTensors(torch.arange(70) % 23, drawn[4], torch.tensor([50, 50, 70], dtype=torch.int32), 23)
    operands = x_TD, edges, up_EHD, down_EDH, activation
    z_NH = x_TD.new_empty(70, up_EHD.shape[1])
    trained_TD = _forward(lib, operands, z_NH)
    ours = _forward(lib, operands), trained_TD, *_backward(lib, operands, dy_TD, z_NH)
    leaves = [tensor.float().requires_grad_() for tensor in (x_TD, edges.weight, up_EHD, down_EDH)]
    exact_TD = reference(leaves[0], edges._replace(weight=leaves[1]), leaves[2], leaves[3], activation)
    exact = exact_TD, exact_TD, *torch.autograd.grad(exact_TD, leaves, dy_TD.float())
    names = "the output", "the output with z kept", *(f"the gradient of {name}" for name in "x weight up down".split())
    for name, one, other in zip(names, ours, exact, strict=True):
        if not (one.float() - other).norm() <= tolerance * other.norm():
            return name
    return None
