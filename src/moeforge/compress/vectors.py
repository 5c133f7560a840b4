"""Weights by fours to the nearest of 256 vectors that are fitted to a matrix (after GPTVQ, arXiv:2402.15319, and VPTQ,
arXiv:2409.17066): k-means in which an input's errors count by its second moment, then rounding with feedback.

The vectors lie on whole numbers, in units of each group's scale, so that they are codes of 4 bits for the kernel.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.compress.feedback import Inputs, round_twice
from moeforge.kernels.native.formats import BLOCK
from moeforge.kernels.native.vectors import LARGEST, LENGTH, VECTORS, VectorWeight

UNIT = 2.5
"""Codes of the root mean square of a group: what lies beyond ``LARGEST`` is cut, what lies inside has few steps."""
SAMPLE, STEPS = 1 << 14, 10
"""Vectors that the codebook is fitted to, at most, and how often."""


def with_feedback(weight: Tensor, inputs: Inputs, group: int, width: int) -> VectorWeight:
    """[R, C], C a multiple of 128, of which ``width`` inputs count -> a stack of one.

    Four inputs are rounded at once.
    """
    book = codebook(weight, inputs.gram.diagonal(), group)
    code = partial(best_vectors, book)
    codes, scales = round_twice(weight, inputs, group, lambda values, _: unit(values), code, LENGTH)
    return VectorWeight.of_codes(codes, scales, book, group, width)


def best_vectors(book: Tensor, values: Tensor, step: Tensor, own: Tensor) -> Tensor:
    """As ``Code``, the vectors whose error leaves least once later inputs have made it good: the metric of GPTVQ's
    equation 4 with all of its 4 x 4 block."""
    apart = torch.linalg.inv(own)
    ratio = torch.where(step > 0, values / step, 0.0).T
    return book[torch.cdist(ratio @ apart, book.float() @ apart).argmin(1)].T


def nearest(weight: Tensor, moment: Tensor, group: int) -> VectorWeight:
    """[n, out, in] with second moments [n, in] of the inputs: every vector by itself."""
    width, parts = weight.shape[-1], []
    for matrix, own in zip(weight, moment.clamp_min(1e-12 * float(moment.max()) + 1e-30), strict=True):
        wide, inputs = (F.pad(x, (0, -width % BLOCK), value=v) for x, v in ((matrix.float(), 0.0), (own.float(), 1.0)))
        parts.append(with_feedback(wide, Inputs(torch.diag(inputs)), group, width))
    packed, scales, books = (torch.cat([getattr(p, name) for p in parts]) for name in ("packed", "scales", "codebook"))
    return VectorWeight(packed, scales, books, group, tuple(weight.shape))


def unit(values: Tensor) -> Tensor:
    """Weights [..., group] -> float16 [...]: the first scale of a group."""
    return (values.square().mean(-1).sqrt() / UNIT).clamp_max(torch.finfo(torch.float16).max).to(torch.float16)


def codebook(weight: Tensor, moment: Tensor, group: int) -> Tensor:
    """[R, C] and second moments [C] -> [256, 4] int8: weighted k-means of its vectors."""
    scales = unit(weight.unflatten(1, (-1, group))).float().repeat_interleave(group, 1)
    vectors = torch.where(scales > 0, weight / scales, 0.0).reshape(-1, LENGTH)
    counts = (moment * scales.square()).reshape(-1, LENGTH)
    some = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    vectors, counts = vectors[some], counts[some]
    centres = vectors[torch.arange(VECTORS) * len(vectors) // VECTORS]
    for _ in range(STEPS):
        distance = counts @ centres.square().T - 2 * (counts * vectors) @ centres.T
        nearest = distance.argmin(1)
        total, wanted = (torch.zeros_like(centres).index_add(0, nearest, x) for x in (counts, counts * vectors))
        centres = torch.where(total > 0, wanted / total, centres)
    return centres.round().clamp(-LARGEST, LARGEST).to(torch.int8)
