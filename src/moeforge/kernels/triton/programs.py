"""The Triton programs of engine ``triton``. Importing this module needs Triton.

Shapes: T tokens, D d_model, H d_expert, E experts, N edges; in a tile R rows, C columns, K steps of the inner loop.
``tl.constexpr`` parameters are in capitals. Every index that is multiplied by a width is 64 bits wide.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton interprets the programs on the CPU (TRITON_INTERPRET=1 when this module is imported)."""


@triton.jit
def _add(a, b):
    # Of our own, for the interpreter takes Triton's only where it was told to interpret before anyone imported Triton.
    return a + b


@triton.jit
def _pointwise(x, POINTWISE: tl.constexpr):
    if POINTWISE == "silu":
        return x / (1 + tl.exp(-x))
    elif POINTWISE == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _slope(x, POINTWISE: tl.constexpr):
    if POINTWISE == "silu":
        sigmoid = 1 / (1 + tl.exp(-x))
        return sigmoid * (1 + x * (1 - sigmoid))
    elif POINTWISE == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    else:
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _multiply_add(left_RK, right_KC, total_RC, PRECISION: tl.constexpr):
    """total + left @ right. The interpreter knows no bf16 arithmetic: there the factors are widened first."""
    if INTERPRETED:
        return tl.dot(left_RK.to(tl.float32), right_KC.to(tl.float32), total_RC, input_precision="ieee")
    else:
        return tl.dot(left_RK, right_KC, total_RC, input_precision=PRECISION)


@triton.jit
def _product(
    row_R, live_R, column_C, live_C, size, step,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """[R, C] float32 sums over k < ``size`` of ``row_R[k] * column_C[k * step]``; both are pointers to k = 0.

    The order of the sum depends on nothing but the tile's sizes, so no row's result depends on another row.
    """
    total_RC = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for low in range(0, size, INNER):
        k = low + tl.arange(0, INNER)
        left_RK = tl.load(row_R[:, None] + k[None, :], live_R[:, None] & (k < size)[None, :], 0.0)
        right_KC = tl.load(column_C[None, :] + k[:, None] * step, (k < size)[:, None] & live_C[None, :], 0.0)
        total_RC = _multiply_add(left_RK, right_KC, total_RC, PRECISION)
    return total_RC


@triton.jit
def up_and_activate(
    x, token, up, z, a, tile_expert, tile_low, ends, D, H, up_e, up_h, up_d,
    POINTWISE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """z[n] = x[token[n]] @ up[e].T and a[n] = act(z[n]), one tile of an expert's rows and of hidden units.

    With a gate, the tile's columns are gate and value of one unit in turn, which ends in the two factors of ``a`` in
    the same thread.
    """
    HALVES: tl.constexpr = 2 if GATED else 1
    COLUMNS: tl.constexpr = UNITS * HALVES
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    low, high = tl.load(tile_low + tl.program_id(0)), tl.load(ends + expert)
    if low >= high:
        return
    row_R = (low + tl.arange(0, ROWS)).to(tl.int64)
    live_R = row_R < high
    first, column = tl.program_id(1) * UNITS, tl.arange(0, COLUMNS)
    unit_C = first + column // HALVES
    up_C = up + expert * up_e + (unit_C + column % HALVES * H).to(tl.int64) * up_h
    x_R = x + tl.load(token + row_R, live_R, 0) * D
    total_RC = _product(x_R, live_R, up_C, unit_C < H, D, up_d, PRECISION, ROWS, COLUMNS, INNER)
    # What is activated is what backward will read: the rounded z.
    z_RC = total_RC.to(z.dtype.element_ty)
    unit_U = first + tl.arange(0, UNITS)
    live_RU = live_R[:, None] & (unit_U < H)[None, :]
    z_RU = z + row_R[:, None] * (HALVES * H) + unit_U[None, :]
    if GATED:
        gate_RU, value_RU = tl.split(tl.reshape(z_RC, (ROWS, UNITS, 2)))
        tl.store(z_RU, gate_RU, live_RU)
        tl.store(z_RU + H, value_RU, live_RU)
        a_RU = _pointwise(gate_RU.to(tl.float32), POINTWISE) * value_RU.to(tl.float32)
    else:
        tl.store(z_RU, z_RC, live_RU)
        a_RU = _pointwise(z_RC.to(tl.float32), POINTWISE)
    tl.store(a + row_R[:, None] * H + unit_U[None, :], a_RU.to(a.dtype.element_ty), live_RU)


@triton.jit
def project(
    rows, weight, place, matrix, out, tile_expert, tile_low, ends, SIZE, WIDTH, matrix_e, matrix_c, matrix_k,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[place[n]] = weight[n] * (matrix[e] @ rows[n]), where matrix[e] is [WIDTH, SIZE] by its strides."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    low, high = tl.load(tile_low + tl.program_id(0)), tl.load(ends + expert)
    if low >= high:
        return
    row_R = (low + tl.arange(0, ROWS)).to(tl.int64)
    live_R = row_R < high
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live_C = column_C < WIDTH
    matrix_C = matrix + expert * matrix_e + column_C.to(tl.int64) * matrix_c
    total_RC = _product(rows + row_R * SIZE, live_R, matrix_C, live_C, SIZE, matrix_k, PRECISION, ROWS, COLUMNS, INNER)
    if WEIGHTED:
        total_RC *= tl.load(weight + row_R, live_R, 0.0).to(tl.float32)[:, None]
    place_R = tl.load(place + row_R, live_R, 0)
    out_RC = out + place_R[:, None] * WIDTH + column_C[None, :]
    tl.store(out_RC, total_RC.to(out.dtype.element_ty), live_R[:, None] & live_C[None, :])


@triton.jit
def sum_rows(rows, first, out, WIDTH, COLUMNS: tl.constexpr):
    """out[t] = sum of rows[first[t]] to rows[first[t + 1] - 1], one after another, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live_C = column_C < WIDTH
    total_C = tl.full((COLUMNS,), 0.0, tl.float32)
    for row in range(tl.load(first + token), tl.load(first + token + 1)):
        total_C += tl.load(rows + row * WIDTH + column_C, live_C, 0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column_C, total_C.to(out.dtype.element_ty), live_C)


@triton.jit
def down_and_activate_backward(
    dy, token, weight, down, z, dz, weighted, dweight, tile_expert, tile_low, ends, D, H, down_e, down_d, down_h,
    POINTWISE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """From da[n] = dy[token[n]] @ down[e], which is never stored: dz, weight * a, and this tile's share of dweight.

    dweight is [N, tiles of hidden units]: the sum of its row is the gradient of a combine weight.
    """
    HALVES: tl.constexpr = 2 if GATED else 1
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    low, high = tl.load(tile_low + tl.program_id(0)), tl.load(ends + expert)
    if low >= high:
        return
    row_R = (low + tl.arange(0, ROWS)).to(tl.int64)
    live_R = row_R < high
    unit_U = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    live_U = unit_U < H
    live_RU = live_R[:, None] & live_U[None, :]
    dy_R = dy + tl.load(token + row_R, live_R, 0) * D
    down_U = down + expert * down_e + unit_U.to(tl.int64) * down_h
    da_RU = _product(dy_R, live_R, down_U, live_U, D, down_d, PRECISION, ROWS, UNITS, INNER)
    weight_R = tl.load(weight + row_R, live_R, 0.0).to(tl.float32)
    at_RU = row_R[:, None] * (HALVES * H) + unit_U[None, :]
    gate_RU = tl.load(z + at_RU, live_RU, 0.0).to(tl.float32)
    a_RU = _pointwise(gate_RU, POINTWISE)
    dgate_RU = weight_R[:, None] * da_RU * _slope(gate_RU, POINTWISE)
    if GATED:
        value_RU = tl.load(z + at_RU + H, live_RU, 0.0).to(tl.float32)
        tl.store(dz + at_RU + H, (weight_R[:, None] * da_RU * a_RU).to(dz.dtype.element_ty), live_RU)
        dgate_RU *= value_RU
        a_RU *= value_RU
    tl.store(dz + at_RU, dgate_RU.to(dz.dtype.element_ty), live_RU)
    weighted_RU = (weight_R[:, None] * a_RU).to(weighted.dtype.element_ty)
    tl.store(weighted + row_R[:, None] * H + unit_U[None, :], weighted_RU, live_RU)
    share_R = tl.reduce(da_RU * a_RU, 1, _add)
    tl.store(dweight + row_R * tl.num_programs(1) + tl.program_id(1), share_R, live_R)


@triton.jit
def weight_gradient(
    rows, gathered, token, out, ends, SIZE, WIDTH, out_e, out_i, out_j,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[e, i, j] = sum over the expert's edges n of rows[n, i] * gathered[token[n], j]; zero without edges."""
    expert = tl.program_id(0).to(tl.int64)
    low, high = tl.load(ends + expert - 1, expert > 0, 0), tl.load(ends + expert)
    i_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j_C = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    live_R, live_C = i_R < SIZE, j_C < WIDTH
    total_RC = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(low, high, INNER):
        n_K = (start + tl.arange(0, INNER)).to(tl.int64)
        live_K = n_K < high
        left_RK = tl.load(rows + n_K[None, :] * SIZE + i_R[:, None], live_R[:, None] & live_K[None, :], 0.0)
        token_K = tl.load(token + n_K, live_K, 0)
        right_KC = tl.load(gathered + token_K[:, None] * WIDTH + j_C[None, :], live_K[:, None] & live_C[None, :], 0.0)
        total_RC = _multiply_add(left_RK, right_KC, total_RC, PRECISION)
    out_RC = out + expert * out_e + i_R.to(tl.int64)[:, None] * out_i + j_C.to(tl.int64)[None, :] * out_j
    tl.store(out_RC, total_RC.to(out.dtype.element_ty), live_R[:, None] & live_C[None, :])
