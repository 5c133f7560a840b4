"""Weights to few bits: to the nearest code, with the scale of each group that loses least."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.errors import UserError
from moeforge.hub.store import Format
from moeforge.kernels.mixed import Part
from moeforge.kernels.native.narrow import LEVELS, Narrow, NarrowWeight, pack
from moeforge.kernels.native.quantised import BLOCK, GROUPS, LARGEST, QuantisedWeight, quantise

SHRUNK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85), 3: (1.0, 0.9, 0.8, 0.7, 0.6), 2: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)}
"""The largest level as a share of a group's largest magnitude: what is tried. Fewer levels gain from cutting more."""
TERNARY = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def to_format(weight: Tensor, format: Format, moment: Tensor | None = None) -> Part:
    """[n, out, in] -> the same in ``format``.

    ``moment`` [n, in] are second moments of the inputs, by which an input's errors count; None: all alike. Raises
    UserError for formats there are none of, and for weights that are not finite.
    """
    if format.group is None:
        return weight.to(torch.bfloat16)
    if format.group not in GROUPS:
        raise UserError(f"groups are of {', '.join(map(str, GROUPS))} weights, not of {format.group}")
    if format.bits == 8:
        return quantise(weight, 8, format.group)
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised")
    codes, scales = nearest(weight, format, moment)
    if format.bits == 4:
        return QuantisedWeight.of_codes(codes, scales, 4, format.group, weight.shape[-1])
    bits = cast(Narrow, format.bits)
    return NarrowWeight(pack(codes, bits), scales, bits, format.group, tuple(weight.shape))


def nearest(weight: Tensor, format: Format, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [n, out, multiple of 128] int8 and scales [n, out, groups] float16."""
    assert format.group is not None
    padding = -weight.shape[-1] % BLOCK
    groups = F.pad(weight.float(), (0, padding)).unflatten(-1, (-1, format.group))
    counts = None if moment is None else F.pad(moment.float(), (0, padding)).unflatten(-1, (-1, format.group))[:, None]
    scales = best_scales(groups, format, counts)
    return codes_of(groups, scales.float()[..., None], format).to(torch.int8).flatten(-2), scales


def best_scales(groups: Tensor, format: Format, counts: Tensor | None = None) -> Tensor:
    """[..., groups, size] float32 -> [..., groups] float16: of those tried, the scale with the least squared error."""
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    chosen = torch.zeros_like(largest, dtype=torch.float16)
    for share in TERNARY if format.bits == "ternary" else SHRUNK[int(format.bits)]:
        scale = (largest * share / top_code(format)).to(torch.float16)
        steps = scale.float()[..., None]
        error = (codes_of(groups, steps, format) * steps - groups).square_()
        error = (error if counts is None else error.mul_(counts)).sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    if not bool(chosen.isfinite().all()):
        raise UserError("a weight is too large for a float16 scale")
    return chosen


def top_code(format: Format) -> int:
    """The largest code."""
    if format.bits in LARGEST:
        return LARGEST[int(format.bits)]
    low, step, count = LEVELS[cast(Narrow, format.bits)]
    return low + step * (count - 1)


def codes_of(values: Tensor, scales: Tensor, format: Format) -> Tensor:
    """The nearest codes, as floats; where a scale is 0, any code stands for 0."""
    low, step = (-LARGEST[4], 1) if format.bits == 4 else LEVELS[cast(Narrow, format.bits)][:2]
    level = torch.where(scales > 0, (values / scales - low) / step, 0.0).round_()
    return level.clamp_(0, (top_code(format) - low) // step).mul_(step).add_(low)
