"""Rounding that lets later inputs make good what earlier ones lost (GPTQ, arXiv:2210.17323), scales fitted after it.

A matrix [R, C] is rounded so that its products with the rows that it reads change least. C is a multiple of 128 here; a
group is so many consecutive inputs of one row that share a scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.kernels.native.formats import BLOCK

DAMP = 0.01
"""Of the mean second moment, added to each: what the calibration text happens not to move is not free."""

Scale = Callable[[Tensor, Tensor], Tensor]
"""Weights [R, group] and the second moments [group] of their inputs -> float16 [R]."""
Code = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weights [n, R] of n inputs that are rounded together, their scales [R] float32, and U [n, n] of these inputs (see
``upper``) -> codes int8 [n, R]."""
Rounded = tuple[Tensor, Tensor]
"""Codes int8 [R, C] and scales float16 [R, groups]."""


@dataclass(frozen=True)
class Inputs:
    """What a matrix reads."""

    gram: Tensor
    """[C, C] float32, positive definite: second moments."""

    @classmethod
    def of(cls, rows_ND: Tensor, weight_N: Tensor) -> "Inputs":
        """Rows, the error of each counted by the square of its weight; with zeros to a multiple of 128.

        What N rows say of how D inputs go together is believed to the share N / (N + D): the fewer there are, the
        nearer is the rounding to that of every weight by itself.
        """
        count, width = rows_ND.shape
        rows_NC = F.pad(rows_ND.float() * weight_N.float()[:, None], (0, -width % BLOCK))
        gram = rows_NC.T @ rows_NC / count
        own = gram.diagonal() + DAMP * gram.diagonal().mean()
        gram *= count / (count + width)
        gram.diagonal().copy_(own.where(own > 0, 1.0))  # 1: no row has anything
        return cls(gram)

    @cached_property
    def upper(self) -> Tensor:
        """[C, C] U, U^T U the inverse of ``gram``.

        Row j, divided by its diagonal, is what an error of one at input j is best made good with at the inputs after it
        (equation 3 of the paper, which takes all these rows from one Cholesky factor).
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.gram.double()))
        return torch.linalg.cholesky(inverse, upper=True).float()


def round_twice(weight: Tensor, inputs: Inputs, group: int, scale: Scale, code: Code, size: int = 1) -> Rounded:
    """Codes in order, scales fitted to them, codes in order for these scales, and scales fitted again."""
    codes, _ = round_in_order(weight, inputs, group, scale, code, size)
    fitted = iter(fit_scales(codes, weight, inputs, group).unbind(1))
    codes, _ = round_in_order(weight, inputs, group, lambda *_: next(fitted), code, size)
    return codes, fit_scales(codes, weight, inputs, group)


def round_in_order(weight: Tensor, inputs: Inputs, group: int, scale: Scale, code: Code, size: int = 1) -> Rounded:
    """``size`` inputs after ``size``: their codes, and the error of those spread over the inputs after them.

    A group's scale is chosen when its first input's turn comes, for the weights as they are then.
    """
    left = weight.T.clone(memory_format=torch.contiguous_format)  # [C, R]: an input's weights side by side
    codes, moment, scales = torch.empty(left.shape, dtype=torch.int8), inputs.gram.diagonal(), list[Tensor]()
    for start in range(0, len(left), BLOCK):
        end = start + BLOCK
        block, own = left[start:end], inputs.upper[start:end, start:end]
        errors = torch.empty_like(block)
        for at in range(0, BLOCK, size):
            here, after = slice(at, at + size), slice(at + size, None)
            if (start + at) % group == 0:
                among = slice(start + at, start + at + group)
                scales.append(scale(left[among].T, moment[among]))
            step = scales[-1].float()
            codes[start:end][here] = chosen = code(block[here], step, own[here, here])
            lost = block[here] - chosen * step
            errors[here] = torch.linalg.solve_triangular(own[here, here].T, lost, upper=False)
            block[after].addmm_(own[here, after].T, errors[here], alpha=-1)
        left[end:] -= inputs.upper[start:end, end:].T @ errors
    return codes.T.contiguous(), torch.stack(scales, 1)


def fit_scales(codes: Tensor, weight: Tensor, inputs: Inputs, group: int) -> Tensor:
    """[R, groups] float16: of all scales for these codes those whose products are nearest, by least squares."""
    wide, normal, wanted = codes.float(), list[Tensor](), list[Tensor]()
    for start in range(0, codes.shape[1], group):
        reach = wide[:, start : start + group] @ inputs.gram[start : start + group]
        normal.append((reach * wide).unflatten(1, (-1, group)).sum(-1))
        wanted.append((reach * weight).sum(1))
    products = torch.stack(normal, 1).double()
    own = products.diagonal(dim1=1, dim2=2)
    own += 1e-4 * own.mean(1, keepdim=True) + 1e-30  # a group of zeros has none
    fitted = torch.linalg.solve(products, torch.stack(wanted, 1).double())
    return fitted.clamp(0, torch.finfo(torch.float16).max).to(torch.float16)
