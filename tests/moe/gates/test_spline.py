"""The basis of splines."""

import pytest
import torch

from moeforge.moe.gates.spline import spline_basis


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_splines_sum_to_one_inside_and_go_to_zero_outside(degree: int) -> None:
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    basis = spline_basis(x, 7, degree, reach=2.0)
    assert basis.shape == (101, 7 + degree) and basis.min() >= 0
    torch.testing.assert_close(basis.sum(-1), torch.ones_like(x))
    assert (basis > 0).sum(-1).max() == degree + 1
    assert spline_basis(torch.tensor([-9.0, 9.0]), 7, degree, reach=2.0).abs().max() == 0
    inner = torch.rand(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda inner: spline_basis(inner * 3 - 1.5, 7, degree, 2.0), inner)
