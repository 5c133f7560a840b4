"""Engine ``triton``: interpreted against the reference, compiled for GPUs that are not here, run on one that is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels import choose, expert_mlp, triton
from moeforge.kernels.activation import is_gated
from moeforge.kernels.triton import engine
from moeforge.moe import Route

TYPES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
needs_triton = pytest.mark.skipif(
    engine.find_spec("triton") is None, reason="Triton is not installed: pip install 'moeforge[triton]' (1 GB)"
)


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test makes its programs anew: interpreted, but for those that want a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0" if "gpu" in request.keywords else "1")
    monkeypatch.delitem(sys.modules, "moeforge.kernels.triton.programs", raising=False)
    monkeypatch.delattr(triton, "programs", raising=False)


def operands(
    tokens: int, d_model: int = 20, width: int = 9, experts: int = 3, activation: Activation = "swiglu", **where: Any
) -> list[Tensor]:
    """x, up and down."""
    up = torch.randn(experts, width * (1 + is_gated(activation)), d_model) / d_model**0.5
    down = torch.randn(experts, d_model, width) / width**0.5
    return [tensor.to(**where) for tensor in (torch.randn(tokens, d_model), up, down)]


def ragged(tokens: int, experts: int = 3, device: str = "cpu") -> Route:
    """Any number of experts per token; the first token has the first expert, and nobody the second."""
    mask_TE = torch.rand(tokens, experts) < 0.5
    mask_TE[0, 0], mask_TE[:, 1:2] = True, False
    return Route.from_mask(mask_TE.to(device), torch.rand(tokens, experts, device=device))


def top_k(tokens: int, k: int, experts: int = 3, device: str = "cpu") -> Route:
    ids_TK = torch.rand(tokens, experts).argsort(1)[:, :k].to(device)
    return Route.from_top_k(ids_TK, torch.rand(tokens, k, device=device), experts)


def results(name: str, xs: list[Tensor], route: Route, activation: Activation = "swiglu") -> list[Tensor]:
    """Output, then gradients of x, up, down and the combine weights."""
    inputs = [tensor.detach().requires_grad_() for tensor in (*xs, route.weight)]
    y = expert_mlp(inputs[0], route.with_weight(inputs[3]), inputs[1], inputs[2], activation, name)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, towards)]


def assert_is_reference(xs: list[Tensor], route: Route, activation: Activation = "swiglu") -> None:
    """Within the rounding of the operands' type of the reference in float32."""
    tolerance = TYPES[xs[0].dtype]
    exact = results("reference", [tensor.float() for tensor in xs], route, activation)
    for one, other in zip(results("triton", xs, route, activation), exact, strict=True):
        scale = max(1.0, float(other.abs().max()) if other.numel() else 0.0)
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance * scale)


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=7), rows=st.integers(1, 17))
def test_tiles_cover_each_segment_once(counts: list[int], rows: int) -> None:
    ends_E = torch.tensor(counts).cumsum(0).to(torch.int32)
    expert_S, low_S = engine.schedule(ends_E, sum(counts), rows)
    found = []
    for expert, low in zip(expert_S.tolist(), low_S.tolist(), strict=True):
        high = int(ends_E[expert])
        found += [(expert, edge) for edge in range(low, min(low + rows, high))]
    assert found == [(e, int(ends_E[e]) - count + i) for e, count in enumerate(counts) for i in range(count)]


@given(tokens=st.lists(st.integers(0, 5), max_size=20))
def test_rows_are_placed_by_token_in_the_order_of_edges(tokens: list[int]) -> None:
    route = Route(torch.tensor(tokens, dtype=torch.int64), torch.ones(len(tokens)), torch.tensor([len(tokens)]), 6)
    place_N, first_F = engine.places(route)
    assert first_F.tolist() == [sum(token < t for token in tokens) for t in range(7)]
    assert sorted(range(len(tokens)), key=place_N.tolist().__getitem__) == sorted(
        range(len(tokens)), key=tokens.__getitem__
    )


@needs_triton
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("dtype", TYPES)
def test_every_activation_in_every_type(dtype: torch.dtype, activation: Activation) -> None:
    assert_is_reference(operands(3, activation=activation, dtype=dtype), top_k(3, 2), activation)


@needs_triton
@settings(max_examples=6)
@given(
    tokens=st.integers(1, 20),
    d_model=st.integers(1, 35),
    width=st.integers(1, 35),
    experts=st.integers(1, 4),
    k=st.integers(0, 3),
)
def test_any_shape(tokens: int, d_model: int, width: int, experts: int, k: int) -> None:
    route = top_k(tokens, min(k, experts), experts) if k else ragged(tokens, experts)
    assert_is_reference(operands(tokens, d_model, width, experts), route)


@needs_triton
def test_an_expert_of_many_tiles() -> None:
    assert_is_reference(operands(50, experts=2), top_k(50, 1, experts=2))


@needs_triton
@pytest.mark.parametrize("route", [ragged(9), top_k(9, 2)], ids=["ragged", "top_k"])
def test_a_row_does_not_depend_on_the_others(route: Route) -> None:
    xs = operands(9, dtype=torch.bfloat16)
    y_TD = expert_mlp(xs[0], route, *xs[1:], "swiglu", "triton")
    for token in range(9):
        own = route.token == token
        alone = Route.from_edges(torch.zeros_like(route.token[own]), route.expert[own], route.weight[own], 1, 3)
        assert torch.equal(expert_mlp(xs[0][[token]], alone, *xs[1:], "swiglu", "triton")[0], y_TD[token])


@needs_triton
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_nan_stays_in_its_row_and_its_expert(activation: Activation) -> None:
    xs, route = operands(6, activation=activation), top_k(6, 1)
    xs[0][2, 3] = torch.nan
    expert = int(route.expert[route.token == 2])
    y, dx, dup, ddown, dweight = results("triton", xs, route, activation)
    assert bool(y[2].isnan().all()) and bool(dup[expert].isnan().any())
    assert not y[[0, 1, 3, 4, 5]].isnan().any() and not dx[[0, 1, 3, 4, 5]].isnan().any()
    others = [e for e in range(3) if e != expert]
    assert not dup[others].isnan().any() and not ddown[others].isnan().any()
    assert dweight.isnan().tolist() == (route.token == 2).tolist()


@needs_triton
def test_no_memory_need_be_contiguous() -> None:
    x, up, down = operands(7)
    xs = [x.T.contiguous().T, up.transpose(1, 2).contiguous().transpose(1, 2), down.repeat(1, 1, 2)[..., ::2]]
    xs[2].copy_(down)
    assert not any(tensor.is_contiguous() for tensor in xs)
    assert_is_reference(xs, top_k(7, 2))
    leaf = x.clone().requires_grad_()
    expert_mlp(leaf, top_k(7, 2), up, down, "swiglu", "triton").sum().backward()  # a gradient of stride 0


@needs_triton
def test_experts_without_edges_get_zeros() -> None:
    none = Route.from_mask(torch.zeros(4, 3, dtype=torch.bool), torch.rand(4, 3))
    for tokens, route in ((4, none), (0, top_k(0, 2))):
        assert not any(tensor.any() for tensor in results("triton", operands(tokens), route))
    *_, dup, ddown, _ = results("triton", operands(6), ragged(6))
    assert not dup[1].any() and not ddown[1].any() and dup[0].any() and ddown[2].any()


@needs_triton
def test_it_compiles_into_a_graph() -> None:
    xs, route = operands(5), top_k(5, 2)

    def layer(x: Tensor) -> Tensor:
        return expert_mlp(x, route, *xs[1:], "swiglu", "triton")

    found, expected = [], layer(xs[0])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for function in (layer, compiled):
        leaf = xs[0].clone().requires_grad_()
        y = function(leaf)
        found.append(torch.autograd.grad(y.sum(), leaf)[0])
        assert torch.equal(y, expected)
    assert torch.equal(*found)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "activation", "unit"),
    [
        ("90", "bfloat16", "geglu", "HGMMA"),
        pytest.param("80", "float16", "swiglu", "HMMA", marks=pytest.mark.slow),
        pytest.param("80", "float32", "relu", None, marks=pytest.mark.slow),
    ],
)
def test_the_machine_code_spills_no_register(
    capability: str, dtype: str, activation: str, unit: str | None, tmp_path: Path
) -> None:
    """What ptxas makes for an H100 (90) and an A100 (80), at the sizes and arguments of a real launch."""
    script = Path(__file__).with_name("triton_machine_code.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script), capability, dtype, activation],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    programs = {found["name"]: found for found in map(json.loads, run.stdout.splitlines())}
    assert {name for name, found in programs.items() if found["stack"]} == set()
    assert {found["unit"] for name, found in programs.items() if name != "sum_rows"} == {unit}
    assert len(programs) == 5


def test_what_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    xs = operands(2)
    refused = "engine 'triton' cannot run here: "
    if engine.find_spec("triton") is not None:
        with pytest.raises(UserError, match=refused + r"its sums are float32, too narrow for torch\.float64"):
            choose(*[tensor.double() for tensor in xs], "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(UserError, match=refused + "Triton compiles for GPUs, not for cpu"):
            choose(*xs, "triton")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=refused + r"Triton is not installed.*pip install 'moeforge\[triton\]'"):
        choose(*xs, "triton")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("k", [None, 2, 8])
def test_on_a_gpu(k: int | None, activation: Activation, dtype: torch.dtype) -> None:
    xs = operands(500, 200, 136, 16, activation, device="cuda", dtype=dtype)
    assert_is_reference(xs, top_k(500, k, 16, "cuda") if k else ragged(500, 16, "cuda"), activation)


@pytest.mark.gpu
@needs_triton
def test_a_row_does_not_depend_on_the_others_on_a_gpu() -> None:
    xs, route = operands(300, 256, 128, 8, device="cuda", dtype=torch.bfloat16), top_k(300, 2, 8, "cuda")
    y_TD = expert_mlp(xs[0], route, *xs[1:], "swiglu", "triton")
    assert torch.equal(expert_mlp(xs[0], route, *xs[1:], "swiglu", "triton"), y_TD)
    for token in (0, 7, 299):
        own = route.token == token
        alone = Route.from_edges(torch.zeros_like(route.token[own]), route.expert[own], route.weight[own], 1, 8)
        assert torch.equal(expert_mlp(xs[0][[token]], alone, *xs[1:], "swiglu", "triton")[0], y_TD[token])
