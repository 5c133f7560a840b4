"""Ternary weights of which most are zero, so that they can be coded in less than a bit each (kernels/native/coded.py).

A weight is zero up to a threshold, which decides how many words a matrix takes: in each row the same multiple of its
root mean square, the least whose words fit into the record of the matrix. A one stands for the mean of what is beyond.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moeforge.compress.feedback import Inputs, Rounded, round_twice
from moeforge.kernels.native.coded import ZEROS, CodedWeight, capacity, coded

MULTIPLES = 0.5, 8.0
"""Between which the threshold is looked for: feedback carries weights far beyond the largest that there was."""
STEPS = 6
GAUSSIAN = 1.5
"""The multiple at which weights drawn from a Gaussian fit, rounded to nearest."""


def nearest(weight: Tensor, moment: Tensor) -> CodedWeight:
    """[R, C] with second moments [C] of the inputs -> a stack of one, every weight by itself."""

    def rounded(multiple: float) -> Rounded:
        threshold, scales = split(weight, moment, multiple)
        return beyond(weight, threshold[:, None]), scales[:, None]

    return _fitting(rounded, weight.shape)


def estimate(weight: Tensor, moment: Tensor) -> Tensor:
    """[R, C]: what ``nearest`` would be of Gaussian weights, without looking for the threshold."""
    threshold, scales = split(weight, moment, GAUSSIAN)
    return beyond(weight, threshold[:, None]) * scales.float()[:, None]


def with_feedback(weight: Tensor, inputs: Inputs, width: int) -> CodedWeight:
    """[R, C] of which ``width`` inputs count -> a stack of one."""
    inner, moment = weight[:, :width], inputs.gram.diagonal()[:width]

    def rounded(multiple: float) -> Rounded:
        threshold, scales = split(inner, moment, multiple)
        codes, fitted = round_twice(
            weight, inputs, weight.shape[1], lambda *_: scales, lambda values, *_: beyond(values, threshold)
        )
        return codes[:, :width], fitted

    return _fitting(rounded, inner.shape)


def split(weight: Tensor, moment: Tensor, multiple: float) -> Rounded:
    """[R, C] -> the threshold of each row [R], and float16 [R] the mean of what is beyond it, by ``moment`` [C], or
    the threshold where there are none."""
    size = weight.abs()
    threshold = multiple * weight.square().mean(1).sqrt()
    counted = (size > threshold[:, None]) * moment
    total = counted.sum(1)
    mean = torch.where(total > 0, (size * counted).sum(1) / total, threshold)
    return threshold, mean.clamp_max(torch.finfo(torch.float16).max).to(torch.float16)


def beyond(values: Tensor, threshold: Tensor) -> Tensor:
    """The sign of what is larger than its threshold, int8, else 0."""
    return (values.sign() * (values.abs() > threshold)).to(torch.int8)


def _fitting(rounded: Callable[[float], Rounded], shape: torch.Size) -> CodedWeight:
    """Of the least multiple that fits; its words with zeros to the capacity."""
    most = capacity(*shape)
    low, high = MULTIPLES
    best = coded(torch.zeros(1, *shape, dtype=torch.int8), torch.zeros(1, shape[0], dtype=torch.float16), ZEROS)
    for _ in range(STEPS):
        multiple = math.sqrt(low * high)
        codes, scales = rounded(multiple)
        made = coded(codes[None], scales.T.contiguous(), ZEROS)
        if made.words.shape[-1] <= most:
            best, high = made, multiple
        else:
            low = multiple
    words = torch.nn.functional.pad(best.words, (0, most - best.words.shape[-1]))
    return CodedWeight(words, best.ends, best.scales, ZEROS, best.shape)
