"""Under ``apart`` a row has the same bits alone and among others, whatever it is multiplied or put into."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeforge.kernels.apart import apart, linear, matmul
from moeforge.kernels.native import engine

TYPES = [torch.float32, torch.bfloat16]
W, W3, BIAS = torch.randn(37, 33), torch.randn(5, 33, 19), torch.randn(37)
CELL = nn.GRUCell(33, 12)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, W.to(x.dtype)),
    "linear with bias": lambda x: F.linear(x, W.to(x.dtype), BIAS.to(x.dtype)),
    "@": lambda x: x @ W.T.to(x.dtype),
    "mm": lambda x: torch.mm(x, W.T.to(x.dtype)),
    "a vector": lambda x: x @ W[0].to(x.dtype),
    "bmm": lambda x: torch.bmm(x.expand(5, -1, -1), W3.to(x.dtype)).transpose(0, 1),
    "einsum": lambda x: torch.einsum("tk,ekn->ten", x, W3.to(x.dtype)),
    "einsum with a batch": lambda x: torch.einsum("etk,ekn->ten", x.expand(5, -1, -1), W3.to(x.dtype)),
    "einsum with dots": lambda x: torch.einsum("tk,k...->t...", x, W.T.to(x.dtype)),
    "cdist": lambda x: torch.cdist(x.float(), W),
    "gru": lambda x: CELL(x.float(), x.float()[:, :12]),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "pow": lambda x: x.abs() ** 1.7,
    "square": lambda x: x**2,
    "rsqrt": lambda x: x.abs().rsqrt(),
    "softmax": lambda x: x.softmax(-1),
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_have_the_same_bits_alone(name: str, dtype: torch.dtype) -> None:
    function, x = FUNCTIONS[name], torch.randn(67, 33).to(dtype)
    with apart(), torch.no_grad():
        together = function(x)
        parts = torch.cat([function(x[low:high].clone()) for low, high in ((0, 1), (1, 2), (2, 9), (9, 50), (50, 67))])
    assert torch.equal(together, parts)
    with torch.no_grad():
        torch.testing.assert_close(together, function(x), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 5), (100, 64), (48, 129)], ids=str)
def test_linear_for_any_number_of_rows_and_threads(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = torch.randn(shape).to(dtype), torch.randn(200, shape[1]).to(dtype)
    wanted = (x.double() @ weight.double().T).to(dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = linear(x, weight)
            for count in (1, 2, 3, 8, 12, 13, 16, 47, 48, 49, 100, 200):
                assert torch.equal(linear(x[:count], weight), whole[:count])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(whole, wanted, atol=1e-4, rtol=1e-4 if dtype == torch.float32 else 2e-2)


def test_a_row_without_numbers_stays_in_its_row() -> None:
    x, weight = torch.randn(20, 32), torch.randn(7, 32)
    wanted = linear(x, weight)
    x[3] = torch.nan
    got = linear(x, weight)
    assert got[3].isnan().all() and torch.equal(got[4:], wanted[4:]) and torch.equal(got[:3], wanted[:3])


def test_no_rows_and_more_dimensions() -> None:
    weight = torch.randn(7, 32)
    assert linear(torch.randn(0, 32), weight).shape == (0, 7)
    x = torch.randn(2, 3, 32)
    assert torch.equal(linear(x, weight), linear(x.view(6, 32), weight).view(2, 3, 7))


def test_without_a_compiler_rows_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "missing", lambda: "there is no compiler")
    x, weight = torch.randn(20, 33).bfloat16(), torch.randn(9, 33).bfloat16()
    assert torch.equal(linear(x, weight)[5:6], linear(x[5:6], weight))
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert linear(x[:0], weight).shape == (0, 9)


@pytest.mark.parametrize("refused", [torch.addmm, torch.baddbmm, F.bilinear, F.scaled_dot_product_attention])
def test_other_products_are_refused_by_name(refused: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 3)
    with apart(), pytest.raises(NotImplementedError, match=refused.__name__):
        refused(x, x, x)


@pytest.mark.parametrize("native", [True, False])
def test_what_does_not_fit_is_refused_before_it_is_read(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(engine, "missing", lambda: "there is no compiler")
    with pytest.raises(ValueError, match=r"rows of shape \(3, 8\) and a matrix \(4, 9\) do not fit"):
        linear(torch.randn(3, 8), torch.randn(4, 9))
    with pytest.raises(ValueError, match="do not fit"):
        linear(torch.randn(3, 8), torch.randn(4, 8), torch.randn(3))


SHAPES = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4, 5)),
    ((7, 1, 3, 4), (2, 4, 5)),
    ((3, 4), (4,)),
    ((4,), (4, 5)),
    ((4,), (4,)),
]


@pytest.mark.parametrize(("left", "right"), SHAPES, ids=str)
def test_matmul_of_any_dimensions(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = torch.randn(left), torch.randn(right)
    torch.testing.assert_close(matmul(a, b), a @ b)
