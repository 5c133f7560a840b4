"""Vectors of a codebook: each the best of all 256 where it stands, the codebook of least error around it."""

from functools import partial

import torch

from moeforge.compress.feedback import Inputs, round_in_order
from moeforge.compress.rounding import expert_to_format, to_format
from moeforge.compress.vectors import best_vectors, codebook, unit
from moeforge.hub.store import Format
from moeforge.kernels.native.vectors import VectorWeight
from tests.compress.test_feedback import rows, wide


def test_a_vector_is_the_one_that_leaves_least_when_later_inputs_have_made_it_good() -> None:
    weight, inputs = torch.randn(3, 128), Inputs.of(rows(400, 128), torch.rand(400))
    book = torch.randint(-7, 8, (256, 4), dtype=torch.int8)
    codes, scales = round_in_order(weight, inputs, 128, lambda values, _: unit(values), partial(best_vectors, book), 4)
    left, gram, step = weight.double(), inputs.gram.double(), scales.double()
    for at in range(0, 128, 4):
        tail = gram[at:, at:]
        best = []
        for row in range(3):
            wrong = left[row, None, at : at + 4] - book.double() * step[row]  # [256, 4]
            # What is left of the error once the inputs after it are free: the Schur complement.
            apart = tail[:4, :4] - (tail[:4, 4:] @ tail[4:, 4:].inverse() @ tail[4:, :4] if at < 124 else 0)
            best.append(((wrong @ apart) * wrong).sum(1).argmin())
        chosen = book[torch.stack(best)]
        assert torch.equal(chosen, codes[:, at : at + 4])
        wrong = left[:, at : at + 4] - chosen * step
        left[:, at + 4 :] += wrong @ tail[:4, 4:] @ tail[4:, 4:].inverse()


def test_the_codebook_is_about_the_means_of_what_is_nearest() -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(64, 128), torch.rand(128) + 0.1
    book = codebook(weight, moment, 128).float()
    scales = unit(weight).float()[:, None]
    vectors, counts = (weight / scales).view(-1, 4), (moment * scales.square()).view(-1, 4)

    distance = ((vectors[:, None] - book).square() * counts[:, None]).sum(-1)
    nearest = distance.argmin(1)
    total, wanted = (torch.zeros(256, 4).index_add(0, nearest, x) for x in (counts, counts * vectors))
    used = total[:, 0] > 0
    assert used.sum() > 240
    assert float((wanted / total - book)[used].clamp(-7, 7).abs().mean()) < 0.5  # on whole numbers, after ten rounds
    alike = codebook(weight, torch.ones(128), 128).float()
    other = ((vectors[:, None] - alike).square() * counts[:, None]).sum(-1).amin(1).sum()
    assert distance.amin(1).sum() < 0.995 * other  # where the inputs count alike, those that count more lose more


def test_vectors_lose_less_than_two_bits_for_each_weight() -> None:
    torch.manual_seed(1)
    x, weight_N = rows(800, 256), torch.rand(800)
    up, down = torch.randn(256, 256) / 16, torch.randn(256, 128) / 11
    lost = [
        float((x @ (wide(expert_to_format(up, down, format, x, weight_N, "swiglu")[0]) - up).T).norm())
        for format in (Format("vector", 128), Format(2, 128))
    ]
    assert lost[0] < 0.95 * lost[1]


def test_a_matrix_of_so_few_vectors_comes_back() -> None:
    torch.manual_seed(2)
    few = torch.randint(-7, 8, (256, 4)).float()
    weight = few[torch.randint(0, 256, (40, 32))].flatten(1)[None]
    weight /= weight.square().mean(-1, keepdim=True).sqrt()
    part = to_format(weight, Format("vector", 128))
    assert isinstance(part, VectorWeight)
    assert float((part.dequantise() - weight).norm() / weight.norm()) < 0.2
    assert part.shape == weight.shape
    zero = to_format(torch.zeros(2, 8, 24), Format("vector", 32))
    assert not isinstance(zero, torch.Tensor) and not zero.dequantise().any()
