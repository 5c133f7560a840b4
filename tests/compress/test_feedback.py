"""Rounding with feedback: against the formula with an inverse at every step, least squares, and rounding to nearest."""

import pytest
import torch

from moeforge.compress.feedback import Inputs, fit_scales, round_in_order
from moeforge.compress.rounding import best_scales, codes_of, expert_to_format, to_format
from moeforge.errors import UserError
from moeforge.hub.store import Format
from moeforge.kernels.activation import activate
from moeforge.kernels.mixed import Part
from moeforge.kernels.native.coded import ZEROS, CodedWeight, capacity

FORMATS = (
    Format(4, 32),
    Format(3, 128),
    Format(2, 64),
    Format("vector", 64),
    Format("ternary", 128),
    Format("coded", None),
)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Whose values depend on one another, as those of a layer do."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(count, width // 4, generator=draw) @ torch.randn(width // 4, width, generator=draw)
    return few / few.std() + 0.3 * torch.randn(count, width, generator=draw)


def scale(values: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return best_scales(values[:, None], 3, moment)[:, 0]


def code(values: torch.Tensor, step: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return codes_of(values, step, 3)


def test_it_is_the_optimal_brain_surgeon_with_an_inverse_at_every_step() -> None:
    weight, inputs = torch.randn(5, 256), Inputs.of(rows(400, 256), torch.rand(400))
    codes, scales = round_in_order(weight, inputs, 64, scale, code)
    left, gram = weight.double(), inputs.gram.double()
    for at in range(256):
        if at % 64 == 0:
            group = slice(at, at + 64)
            step = scale(left[:, group].float(), inputs.gram.diagonal()[group])
            assert torch.equal(step, scales[:, at // 64])
        chosen = code(left[:, at].float(), step.float())
        assert torch.equal(chosen, codes[:, at])
        inverse = gram[at:, at:].inverse()
        left[:, at:] -= ((left[:, at] - chosen * step.double()) / inverse[0, 0])[:, None] * inverse[0]


def test_inputs_that_say_nothing_of_one_another_get_the_nearest_codes() -> None:
    weight, inputs = torch.randn(7, 128), Inputs(torch.diag(torch.rand(128) + 0.1))
    codes, scales = round_in_order(weight, inputs, 128, scale, code)
    wanted = to_format(weight[None], Format(3, 128), inputs.gram.diagonal()[None])
    found = codes.float() * scales.float()
    assert not isinstance(wanted, torch.Tensor) and torch.equal(found, wanted.dequantise()[0])


def test_rows_count_by_their_weights_and_few_of_them_say_little_of_how_inputs_go_together() -> None:
    x, weight_N = rows(10, 30), torch.rand(10)
    found = Inputs.of(x, weight_N).gram
    wanted = sum(w * w * torch.outer(row, row) for w, row in zip(weight_N, x, strict=True)) / 10
    apart = 1 - torch.eye(30)
    torch.testing.assert_close(found[:30, :30] * apart, wanted * apart * 10 / (10 + 30))
    extra = found.diagonal() - torch.nn.functional.pad(wanted.diagonal(), (0, 98))
    torch.testing.assert_close(extra, 0.01 * (wanted.trace() / 128).expand(128))


def test_scales_are_the_least_squares() -> None:
    x, weight_N, codes = rows(500, 128), torch.rand(500), torch.randint(-7, 8, (6, 128)).to(torch.int8)
    weight = codes * (0.1 + torch.rand(6, 4)).repeat_interleave(32, 1) + 0.1 * torch.randn(6, 128)
    inputs = Inputs.of(x, weight_N)
    found = fit_scales(codes, weight, inputs, 32).float()
    seen = torch.linalg.cholesky(inputs.gram).T  # as few rows with the same second moments
    for row in range(6):
        parts = torch.stack([seen[:, at : at + 32] @ codes[row, at : at + 32].float() for at in range(0, 128, 32)], 1)
        wanted = torch.linalg.lstsq(parts, seen @ weight[row]).solution
        torch.testing.assert_close(found[row], wanted, rtol=0.01, atol=0.002)


def wide(part: Part) -> torch.Tensor:
    return part[0].float() if isinstance(part, torch.Tensor) else part.dequantise()[0]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize(("width", "hidden"), [(96, 40), (256, 128)])
def test_an_experts_output_is_nearer_than_that_of_the_nearest_codes(format: Format, width: int, hidden: int) -> None:
    torch.manual_seed(1)
    x, weight_N = rows(600, width), torch.rand(600)
    up, down = torch.randn(2 * hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5

    def run(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        return weight_N[:, None] * (activate(x @ above.T, "swiglu") @ below.T)

    nearest = [to_format(matrix[None], format) for matrix in (up, down)]
    found = expert_to_format(up, down, format, x, weight_N, "swiglu")
    errors = [float((run(*map(wide, parts)) - run(up, down)).norm()) for parts in (found, nearest)]
    assert errors[0] < (0.9 if format.bits == "coded" else 0.8) * errors[1]
    for part, matrix in zip(found, (up, down), strict=True):
        assert part.shape == (1, *matrix.shape)
        if isinstance(part, CodedWeight):
            assert part.words.shape == (1, capacity(*matrix.shape)) and part.zeros == ZEROS


def test_rows_without_anything_leave_finite_weights() -> None:
    up, down = torch.randn(16, 128), torch.randn(128, 16)
    for format in FORMATS:
        parts = expert_to_format(up, down, format, torch.zeros(3, 128), torch.ones(3), "relu")
        assert all(bool(wide(part).isfinite().all()) for part in parts)


def test_weights_that_are_not_finite_are_refused() -> None:
    bad = torch.full((16, 128), float("nan"))
    for format in FORMATS:
        with pytest.raises(UserError, match="not finite"):
            expert_to_format(bad, torch.randn(128, 16), format, rows(40, 128), torch.ones(40), "relu")
        with pytest.raises(UserError, match="not finite"):
            to_format(bad[None], format)


def test_coded_weights_take_what_a_record_has_and_no_more() -> None:
    weight = torch.randn(2, 64, 300)
    part = to_format(weight, Format("coded", None))
    assert isinstance(part, CodedWeight) and part.words.shape == (2, capacity(64, 300))
    assert 0.9 * capacity(64, 300) < int(part.ends.max()) <= capacity(64, 300)
    found = part.dequantise()
    assert float((found - weight).norm() / weight.norm()) < 0.75
    assert int(to_format(torch.zeros(1, 8, 24), Format("coded", None)).dequantise().count_nonzero()) == 0
