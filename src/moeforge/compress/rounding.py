"""Weights to few bits: to the nearest code, with the scale of each group that loses least, or with feedback."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.compress import threshold, vectors
from moeforge.compress.feedback import Inputs, Rounded, round_twice
from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.hub.store import Format
from moeforge.kernels.activation import activate
from moeforge.kernels.mixed import Part
from moeforge.kernels.native.coded import CodedWeight, stack
from moeforge.kernels.native.formats import BLOCK, FORMATS, Bits
from moeforge.kernels.native.quantised import GROUPS, QuantisedWeight, quantise
from moeforge.kernels.native.vectors import VectorWeight

FEW = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SHRUNK: dict[Bits, tuple[float, ...]] = {
    **{8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85), 3: (1.0, 0.9, 0.8, 0.7, 0.6)},
    **{2: FEW, "ternary": FEW},
}
"""The largest level as a share of a group's largest magnitude: what is tried. Fewer levels gain from cutting more."""


def to_format(weight: Tensor, format: Format, moment: Tensor | None = None) -> Part:
    """[n, out, in] -> the same in ``format``, to nearest.

    ``moment`` [n, in] are second moments of the inputs, by which an input's errors count; None: all alike. Raises
    UserError for formats there are none of, and for weights that are not finite.
    """
    if format.bits == 16:
        return weight.to(torch.bfloat16)
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised")
    counts = torch.ones(len(weight), weight.shape[-1]) if moment is None else moment.float()
    if format.bits == "coded":
        return stack([threshold.nearest(*one) for one in zip(weight.float(), counts, strict=True)])
    if format.group not in GROUPS:
        raise UserError(f"groups are of {', '.join(map(str, GROUPS))} weights, not of {format.group}")
    if format.bits == "vector":
        return vectors.nearest(weight, counts, format.group)
    if format.bits == 8:
        return quantise(weight, 8, format.group)
    codes, scales = nearest(weight, format, moment)
    return QuantisedWeight.of_codes(codes, scales, format.bits, format.group, weight.shape[-1])


def expert_to_format(
    up_HD: Tensor, down_DH: Tensor, format: Format, rows_ND: Tensor, weight_N: Tensor, activation: Activation
) -> tuple[Part, Part]:
    """Both matrices of an expert, each [1, out, in], in ``format`` so that its output changes least for these rows.

    Rows count by the square of their combine weights [N]. ``down`` is rounded for what the rounded ``up`` gives it. 8
    and 16 bits are rounded to nearest, where there is next to nothing to gain.
    """
    if format.bits in (16, 8):
        return to_format(up_HD[None], format), to_format(down_DH[None], format)
    up = _with_feedback(up_HD, Inputs.of(rows_ND, weight_N), format)
    hidden_NH = activate(rows_ND.float() @ up.dequantise()[0].T, activation)
    return up, _with_feedback(down_DH, Inputs.of(hidden_NH, weight_N), format)


def _with_feedback(weight: Tensor, inputs: Inputs, format: Format) -> QuantisedWeight | CodedWeight | VectorWeight:
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised")
    width = weight.shape[-1]
    weight = F.pad(weight.float(), (0, -width % BLOCK))
    if format.bits == "coded":
        return threshold.with_feedback(weight, inputs, width)
    assert format.bits != 16 and format.group is not None
    if format.bits == "vector":
        return vectors.with_feedback(weight, inputs, format.group, width)
    codes, scales = feedback(weight, inputs, format.bits, format.group)
    return QuantisedWeight.of_codes(codes[None], scales[None], format.bits, format.group, width)


def feedback(weight: Tensor, inputs: Inputs, bits: Bits, group: int) -> Rounded:
    """[R, C], C a multiple of 128, in whole numbers."""

    def scale(values: Tensor, moment: Tensor) -> Tensor:
        return best_scales(values[:, None], bits, moment)[:, 0]

    return round_twice(weight, inputs, group, scale, lambda values, step, _: codes_of(values, step, bits))


def nearest(weight: Tensor, format: Format, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [n, out, multiple of 128] int8 and scales [n, out, groups] float16."""
    assert format.bits not in (16, "coded", "vector") and format.group is not None
    padding = -weight.shape[-1] % BLOCK
    groups = F.pad(weight.float(), (0, padding)).unflatten(-1, (-1, format.group))
    counts = None if moment is None else F.pad(moment.float(), (0, padding)).unflatten(-1, (-1, format.group))[:, None]
    scales = best_scales(groups, format.bits, counts)
    return codes_of(groups, scales.float()[..., None], format.bits).flatten(-2), scales


def best_scales(groups: Tensor, bits: Bits, counts: Tensor | None = None) -> Tensor:
    """[..., groups, size] float32 -> [..., groups] float16: of those tried, the scale with the least squared error."""
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    chosen = torch.zeros_like(largest, dtype=torch.float16)
    for share in SHRUNK[bits]:
        scale = (largest * share / FORMATS[bits].largest).to(torch.float16)
        steps = scale.float()[..., None]
        error = (codes_of(groups, steps, bits) * steps - groups).square_()
        error = (error if counts is None else error.mul_(counts)).sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    if not bool(chosen.isfinite().all()):
        raise UserError("a weight is too large for a float16 scale")
    return chosen


def codes_of(values: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """The nearest codes, int8; where a scale is 0, any code stands for 0."""
    return FORMATS[bits].nearest(torch.where(scales > 0, values / scales, 0.0))
