"""What launches the Triton programs: the schedule of tiles, the order of summation, and the two passes."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from moeforge.config import Activation
from moeforge.kernels.activation import is_gated
from moeforge.kernels.edges import Edges

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POINTWISE = {"swiglu": "silu", "silu": "silu", "geglu": "gelu", "gelu": "gelu", "relu": "relu"}


class Tile(NamedTuple):
    """The sizes of one program's product, and how a GPU runs it."""

    rows: int
    columns: int
    units: int  # of hidden units, in the products that activate them: fewer, for gate and value take registers
    inner: int
    warps: int
    stages: int


TILES = {2: Tile(128, 128, 64, 64, 8, 3), 4: Tile(128, 64, 32, 32, 8, 3)}
"""Bytes of a value to the tile, which nothing else may choose, least of all the number of rows or a stopwatch: it fixes
the order of every sum, hence that a row's result depends neither on the other rows nor on the day.

One size does for few rows too: a weight of 2 bytes is met by at most 128 rows, 128 FLOP per byte, which is still less
than an A100 (153) or an H100 (295) has time for while the weights stream in. Not yet tuned on a GPU."""
INTERPRETED_TILE = Tile(16, 16, 16, 16, 1, 1)


def schedule(ends_E: Tensor, num_edges: int, rows: int) -> tuple[Tensor, Tensor]:
    """([S] expert, [S] first edge) of tiles of at most ``rows`` edges of one expert each, made on the device.

    S is what any ``num_edges`` could need, so that the host need not wait for ``ends``: the tiles left over come last
    and start at or past the last expert's end, where they find nothing to do.
    """
    count_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    tiles_E = (count_E + rows - 1) // rows
    last_E = tiles_E.cumsum(0)
    tile_S = torch.arange(num_edges // rows + min(num_edges, len(ends_E)), device=ends_E.device)
    expert_S = torch.searchsorted(last_E, tile_S, right=True).clamp_max(len(ends_E) - 1)
    low_E = ends_E - count_E - (last_E - tiles_E) * rows
    return expert_S.to(torch.int32), (low_E[expert_S] + tile_S * rows).to(torch.int32)


def places(edges: Edges) -> tuple[Tensor, Tensor]:
    """([N] where an edge's row goes, [T + 1] where each token's rows begin): by token, in slot or else expert order."""
    token_F = torch.arange(edges.num_tokens + 1, device=edges.token.device)
    if edges.slot is not None and edges.top_k is not None:
        return edges.slot, token_F * edges.top_k
    token_N, order_N = edges.token.sort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return place_N, torch.searchsorted(token_N, token_F)


def why_not(x_TD: Tensor, up_EHD: Tensor, down_EDH: Tensor) -> str | None:
    """The reason these operands cannot run here, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; torch's builds for GPUs bring it, else pip install 'moeforge[triton]'"
    if x_TD.dtype not in DTYPES:
        return f"its sums are float32, too narrow for {x_TD.dtype}"
    if x_TD.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton compiles for GPUs, not for {x_TD.device.type} (TRITON_INTERPRET=1 interprets it, for tests)"
    return None


def forward(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Returns y [T, D] and the pre-activation z [N, H or 2H]."""
    plan, x_TD = _Plan(x_TD, edges, activation), x_TD.contiguous()
    num_edges, width = len(plan.token), down_EDH.shape[2]
    z_NH, a_NH = x_TD.new_empty(num_edges, up_EHD.shape[1]), x_TD.new_empty(num_edges, width)
    with torch.cuda.device_of(x_TD):
        plan.programs.up_and_activate[plan.grid(width, plan.tile.units)](
            x_TD, plan.token, up_EHD, z_NH, a_NH, *plan.tiles, *down_EDH.shape[1:], *up_EHD.stride(),
            **plan.activation, **plan.sizes,
        )  # fmt: skip
        return plan.to_tokens(a_NH, down_EDH, weighted=True), z_NH


def backward(
    dy_TD: Tensor, x_TD: Tensor, z_NH: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, combine weight, up and down."""
    plan, x_TD, dy_TD = _Plan(x_TD, edges, activation), x_TD.contiguous(), dy_TD.contiguous()
    num_edges, width = len(plan.token), down_EDH.shape[2]
    grid = plan.grid(width, plan.tile.units)
    dz_NH, weighted_NH = torch.empty_like(z_NH), x_TD.new_empty(num_edges, width)
    dweight_NS = x_TD.new_empty(num_edges, grid[1], dtype=torch.float32)
    dup_EHD, ddown_EDH = torch.empty_like(up_EHD), torch.empty_like(down_EDH)
    with torch.cuda.device_of(x_TD):
        plan.programs.down_and_activate_backward[grid](
            dy_TD, plan.token, plan.weight, down_EDH, z_NH, dz_NH, weighted_NH, dweight_NS, *plan.tiles,
            *down_EDH.shape[1:], *down_EDH.stride(), **plan.activation, **plan.sizes,
        )  # fmt: skip
        dx_TD = plan.to_tokens(dz_NH, up_EHD.transpose(1, 2), weighted=False)
        plan.weight_gradient(dz_NH, x_TD, dup_EHD)
        plan.weight_gradient(weighted_NH, dy_TD, ddown_EDH.transpose(1, 2))
    return dx_TD, dweight_NS.sum(1).to(edges.weight.dtype), dup_EHD, ddown_EDH


class _Plan:
    """One set of edges, cut into tiles: what the launches of a pass share."""

    def __init__(self, x_TD: Tensor, edges: Edges, activation: Activation) -> None:
        from moeforge.kernels.triton import programs

        self.programs = programs
        self.tile = tile = INTERPRETED_TILE if programs.INTERPRETED else TILES[x_TD.element_size()]
        self.token, self.weight = edges.token.contiguous(), edges.weight.contiguous()
        self.tiles = *schedule(edges.ends, len(self.token), tile.rows), edges.ends
        self.place_N, self.first_F = places(edges)
        self.activation = {"POINTWISE": POINTWISE[activation], "GATED": is_gated(activation), "UNITS": tile.units}
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.sizes = {"PRECISION": precision, "ROWS": tile.rows, "INNER": tile.inner}
        # Fused multiply-adds by name: left to itself, Triton 3.9 warns that its default is about to change.
        self.sizes |= {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}

    def grid(self, width: int, columns: int) -> tuple[int, int]:
        """A program for each tile of rows and of columns; the former vary first, so an expert's share its weights."""
        return len(self.tiles[0]), -(-width // columns)

    def to_tokens(self, rows_NK: Tensor, matrix_EDK: Tensor, weighted: bool) -> Tensor:
        """[T, D] each token's rows through their experts' matrices, summed; [N, D] is written once in between."""
        _, width, size = matrix_EDK.shape
        num_tokens = len(self.first_F) - 1
        out_ND, out_TD = rows_NK.new_empty(len(rows_NK), width), rows_NK.new_empty(num_tokens, width)
        self.programs.project[self.grid(width, self.tile.columns)](
            rows_NK, self.weight, self.place_N, matrix_EDK, out_ND, *self.tiles, size, width, *matrix_EDK.stride(),
            WEIGHTED=weighted, COLUMNS=self.tile.columns, **self.sizes,
        )  # fmt: skip
        columns = min(1024, 1 << (width - 1).bit_length())
        self.programs.sum_rows[num_tokens, -(-width // columns)](
            out_ND, self.first_F, out_TD, width, COLUMNS=columns, enable_fp_fusion=True
        )
        return out_TD

    def weight_gradient(self, rows_NI: Tensor, gathered_TJ: Tensor, out_EIJ: Tensor) -> None:
        """Writes each expert's sum of outer products of its edges' rows and tokens."""
        num_experts, size, width = out_EIJ.shape
        grid = num_experts, -(-size // self.tile.rows), -(-width // self.tile.columns)
        self.programs.weight_gradient[grid](
            rows_NI, gathered_TJ, self.token, out_EIJ, self.tiles[-1], size, width, *out_EIJ.stride(),
            COLUMNS=self.tile.columns, **self.sizes,
        )  # fmt: skip
