"""The native engine against the reference over made-up shapes, and what it promises beyond: bits, NaNs, bad input."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels import choose, expert_mlp, native
from moeforge.kernels.activation import is_gated
from moeforge.kernels.native import build, engine
from moeforge.moe import Route

pytestmark = pytest.mark.skipif(engine.missing() is not None, reason="the native engine does not run here")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
dtypes = st.sampled_from(list(TOLERANCE))


def layer(
    tokens: int,
    d_model: int,
    d_expert: int,
    experts: int,
    k: int,
    dtype: torch.dtype,
    activation: Activation = "swiglu",
) -> tuple[list[Tensor], Route]:
    """x, up and down, and a route of k experts a token."""
    up = torch.randn(experts, d_expert * (1 + is_gated(activation)), d_model) / d_model**0.5
    operands = [torch.randn(tokens, d_model), up, torch.randn(experts, d_model, d_expert) / d_expert**0.5]
    ids_TK = torch.rand(tokens, experts).argsort(1)[:, :k]
    return [tensor.to(dtype) for tensor in operands], Route.from_top_k(ids_TK, torch.rand(tokens, k), experts)


def passes(operands: list[Tensor], route: Route, activation: Activation, name: str) -> list[Tensor]:
    """y and the gradients of x, up, down and combine weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*operands, route.weight)]
    y_TD = expert_mlp(leaves[0], route.with_weight(leaves[3]), leaves[1], leaves[2], activation, name)
    towards = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(1)).to(y_TD.dtype)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, towards)]


def far(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error in any, relative to the largest value where that is above one: sums of bf16 may cancel."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, exact, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


@settings(max_examples=60)
@given(
    tokens=st.one_of(st.integers(1, 20), st.integers(21, 150)),
    d_model=st.integers(1, 70),
    d_expert=st.integers(1, 50),
    experts=st.integers(1, 5),
    k=st.integers(1, 3),
    dtype=dtypes,
    activation=st.sampled_from(get_args(Activation)),
)
def test_any_shape_is_the_reference(
    tokens: int, d_model: int, d_expert: int, experts: int, k: int, dtype: torch.dtype, activation: Activation
) -> None:
    operands, route = layer(tokens, d_model, d_expert, experts, min(k, experts), dtype, activation)
    exact = passes([tensor.float() for tensor in operands], route, activation, "reference")
    assert far(passes(operands, route, activation, "native"), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("d_model", "d_expert"), [(64, 32), (37, 21)])
def test_a_row_has_the_same_bits_whoever_is_beside_it(dtype: torch.dtype, d_model: int, d_expert: int) -> None:
    """Alone, in company of any size (every shape of block), with neighbours that are NaN, and in the training pass."""
    (x_TD, up, down), route = layer(130, d_model, d_expert, 3, 2, dtype)
    every_TD = expert_mlp(x_TD, route, up, down, "swiglu", "native")
    ids_TK = route.expert[route.slot.argsort()].view(130, 2)
    weights_TK = route.weight[route.slot.argsort()].view(130, 2)
    for count in (1, 2, 3, 5, 9, 13, 17, 33, 49, 100):
        part = Route.from_top_k(ids_TK[:count], weights_TK[:count], 3)
        assert torch.equal(expert_mlp(x_TD[:count], part, up, down, "swiglu", "native"), every_TD[:count])
    poisoned_TD = x_TD.clone()
    poisoned_TD[::2] = float("nan")
    found_TD = expert_mlp(poisoned_TD, route, up, down, "swiglu", "native")
    assert torch.equal(found_TD[1::2], every_TD[1::2]) and bool(found_TD[::2].isnan().all())
    assert torch.equal(passes([x_TD, up, down], route, "swiglu", "native")[0], every_TD)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    operands, route = layer(200, 64, 48, 4, 2, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(passes(operands, route, "swiglu", "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_expert_may_get_everything(dtype: torch.dtype) -> None:
    (x_TD, up, down), _ = layer(300, 32, 16, 4, 1, dtype)
    route = Route.from_top_k(torch.full((300, 1), 2), torch.rand(300, 1), 4)
    found, exact = (passes([x_TD, up, down], route, "swiglu", name) for name in ("native", "reference"))
    assert far(found, exact) < TOLERANCE[dtype]
    assert not found[2][[0, 1, 3]].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_may_reach_an_expert_twice(dtype: torch.dtype) -> None:
    operands, _ = layer(3, 8, 4, 2, 1, dtype)
    route = Route.from_edges(torch.tensor([1, 1, 2]), torch.tensor([0, 0, 1]), torch.rand(3), 3, 2)
    assert far(*(passes(operands, route, "swiglu", name) for name in ("native", "reference"))) < 0.02


def test_strides_do_not_matter() -> None:
    (x_TD, up, down), route = layer(20, 16, 8, 3, 2, torch.float32)
    strided = x_TD.T.contiguous().T, up.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([down, down])[1]
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    found, exact = (
        expert_mlp(*each, "swiglu", "native") for each in ((strided[0], route, *strided[1:]), (x_TD, route, up, down))
    )
    assert torch.equal(found, exact)


def test_types_that_differ_are_refused() -> None:
    (x_TD, up, down), route = layer(5, 8, 4, 2, 1, torch.float32)
    with pytest.raises(UserError, match=r"rows are torch\.bfloat16, experts torch\.float32 and"):
        expert_mlp(x_TD.bfloat16(), route, up, down, "swiglu")
    with pytest.raises(UserError, match=r"engine 'native' cannot run here: it has no torch\.float16"):
        expert_mlp(x_TD.half(), route, up.half(), down.half(), "swiglu", "native")


def test_shapes_and_routes_that_do_not_fit_are_refused() -> None:
    (x_TD, up, down), route = layer(5, 8, 4, 2, 1, torch.float32)
    with pytest.raises(UserError, match=r"x \(5, 8\), up \(2, 8, 8\) and down \(2, 8, 3\) do not fit"):
        expert_mlp(x_TD, route, up, down[:, :, :3], "swiglu", "native")
    with pytest.raises(UserError, match="the route has 2 experts, the weights have 1"):
        expert_mlp(x_TD, route, up[:1], down[:1], "swiglu", "native")
    beyond = Route(route.token + 4, route.weight, route.ends, 5)
    with pytest.raises(UserError, match="names a token"):
        expert_mlp(x_TD, beyond, up, down, "swiglu", "native")


def test_int32_tokens_are_taken() -> None:
    (x_TD, up, down), route = layer(5, 8, 4, 2, 1, torch.float32)
    short = engine.EdgeTensors(route.token.int(), route.weight, route.ends, 5)
    assert torch.equal(engine.infer(x_TD, short, up, down, "swiglu"), engine.infer(x_TD, route, up, down, "swiglu"))


def test_edges_that_belong_to_nobody_have_no_gradient() -> None:
    (x_TD, up, down), route = layer(40, 8, 4, 2, 1, torch.float32)
    padded = engine.EdgeTensors(route.token.repeat(2), route.weight.repeat(2), route.ends, 40)
    z_NH = x_TD.new_empty(80, up.shape[1])
    engine._forward(engine.open_library(), (x_TD, padded, up, down, "swiglu"), z_NH)
    torch.empty(80).fill_(3.0)  # what the allocator hands out next
    dweight_N = engine.backward(torch.ones_like(x_TD), x_TD, z_NH, padded, up, down, "swiglu")[1]
    assert bool(dweight_N[:40].all()) and not dweight_N[40:].any()


class Broken:
    """The library, but a pass leaves zeros at the start of what its argument number ``spoilt`` points to."""

    def __init__(self, name: str, spoilt: int) -> None:
        self.lib, self.name, self.spoilt = engine.open_library(), name, spoilt

    def __getattr__(self, name: str) -> Any:
        return self.spoil if name == self.name else getattr(self.lib, name)

    def spoil(self, *arguments: Any) -> int:
        """The pass, then the damage."""
        status = getattr(self.lib, self.name)(*arguments)
        if arguments[self.spoilt].value:
            ctypes.memset(arguments[self.spoilt], 0, 64)
        return status


@pytest.mark.parametrize(
    ("name", "spoilt", "message"),
    [
        ("moeforge_forward", 2, "the output for"),
        ("moeforge_forward", 3, "the gradient of x for"),  # z, kept for it
        ("moeforge_backward", 4, "the gradient of x for"),
        ("moeforge_backward", 5, "the gradient of weight for"),
        ("moeforge_backward", 6, "the gradient of up for"),
        ("moeforge_backward", 7, "the gradient of down for"),
        ("moeforge_pack", 7, "packing to 8 bits"),
        ("moeforge_pack", 8, "packing to 8 bits"),
        ("moeforge_quantised_linear", 5, "a matrix of 8 bits"),
        ("moeforge_quantised", 2, "experts in few bits"),
    ],
)
def test_the_check_of_a_new_library_sees_every_result(
    name: str, spoilt: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Any = Broken(name, spoilt)
    monkeypatch.setattr(engine, "library", lambda check: check(broken))
    with pytest.raises(UserError, match=f"cannot run here: {message}"):
        engine.open_library()


def test_auto_takes_it_and_the_environment_overrules_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (x_TD, up, down), _ = layer(5, 8, 4, 2, 1, torch.float32)
    assert choose(x_TD, up, down)[0] == "native"
    monkeypatch.setenv("MOEFORGE_ENGINE", "streaming")
    assert choose(x_TD, up, down) == ("streaming", "asked for in MOEFORGE_ENGINE")
    assert choose(x_TD, up, down, "native") == ("native", "asked for")
    monkeypatch.setenv("MOEFORGE_ENGINE", "fast")
    with pytest.raises(UserError, match="there is no engine 'fast'"):
        choose(x_TD, up, down)


def test_without_it_auto_takes_torch_and_asking_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (x_TD, up, down), _ = layer(5, 8, 4, 2, 1, torch.float32)
    monkeypatch.setattr(engine, "library", lambda check: "there is no C++ compiler")
    assert choose(x_TD, up, down)[0] == "grouped"
    with pytest.raises(UserError, match=r"engine 'native' cannot run here: there is no C\+\+ compiler"):
        choose(x_TD, up, down, "native")
    with pytest.raises(UserError, match=r"engine 'native' cannot run here: there is no C\+\+ compiler"):
        native.infer(x_TD, layer(5, 8, 4, 2, 1, torch.float32)[1], up, down, "swiglu")


def test_auto_leaves_bf16_to_torch_where_nobody_has_timed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "processor", lambda: set())
    (x_TD, up, down), _ = layer(5, 16, 8, 2, 1, torch.bfloat16)
    assert choose(x_TD, up, down)[0] == "grouped" and "without AVX-512 bf16" in str(native.unmeasured(x_TD))
    assert choose(x_TD, up, down, "native") == ("native", "asked for")
    assert choose(x_TD.float(), up.float(), down.float())[0] == "native"


TILES = f'-DMOEFORGE_TILES="{Path(__file__).parent / "emulated_tiles.h"}"'
VARIANTS = {"without bf16 instructions": (), "on emulated tiles": ("-mavx512bf16", TILES)}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_other_processors_compute_the_same_layer(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = tmp_path / "variant.so"
    base = [*build._compiler(), *build.FLAGS, "-O1", *(f"-m{flag}" for flag in build.NEEDED), *flags]
    source = next(str(source) for source in build.SOURCES if source.name == "experts.cpp")
    subprocess.run([*base, source, "-o", str(path)], check=True, capture_output=True)
    lib = ctypes.CDLL(str(path))
    assert engine._wrong(lib) is None
    (x_TD, up, down), route = layer(130, 70, 33, 3, 2, torch.bfloat16)
    dy_TD, z_NH = torch.randn_like(x_TD), x_TD.new_empty(len(route.token), up.shape[1])
    y_TD = engine._forward(lib, (x_TD, route, up, down, "swiglu"), z_NH)
    gradients = engine._backward(lib, (x_TD, route, up, down, "swiglu"), dy_TD, z_NH)
    leaves = [tensor.float().requires_grad_() for tensor in (x_TD, route.weight, up, down)]
    exact_TD = expert_mlp(leaves[0], route.with_weight(leaves[1]), leaves[2], leaves[3], "swiglu", "reference")
    exact = torch.autograd.grad(exact_TD, leaves, dy_TD.float())
    assert far([y_TD, *gradients], [exact_TD.detach(), *exact]) < TOLERANCE[torch.bfloat16]
    single = Route(route.token[:1] * 0, route.weight[:1], torch.ones_like(route.ends), 1)
    alone = engine._forward(lib, (x_TD[:1], single, up, down, "swiglu"))
    crowd = Route(torch.arange(40) // 40, route.weight[:1].repeat(40) * 0, torch.full_like(route.ends, 40), 1)
    crowd.weight[0] = route.weight[0]
    assert torch.equal(engine._forward(lib, (x_TD[:1], crowd, up, down, "swiglu")), alone)
