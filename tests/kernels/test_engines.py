"""Every engine against the reference loop: values, gradients, types, odd shapes, chunks and what is kept."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels import choose, expert_mlp, native, streaming
from moeforge.kernels.activation import activate, activate_backward, is_gated
from moeforge.kernels.edges import pad_segments
from moeforge.moe import Route
from tests.kernels.engines import ON_CPU

FAST = [name for name in ON_CPU if name != "reference"]
D, H, E = 16, 8, 5


def operands(
    tokens: int = 40, activation: Activation = "swiglu", dtype: torch.dtype = torch.float32, width: int = H
) -> list[Tensor]:
    """x, up and down, all wanting gradients."""
    up = torch.randn(E, width * (1 + is_gated(activation)), D) / D**0.5
    down = torch.randn(E, D, width) / width**0.5
    return [tensor.to(dtype).requires_grad_() for tensor in (torch.randn(tokens, D), up, down)]


def ragged(tokens: int, share: float = 0.4, dtype: torch.dtype = torch.float32) -> Route:
    """A random number of experts per token; expert 2 gets none, and token 0 neither."""
    mask_TE = torch.rand(tokens, E) < share
    mask_TE[:, 2], mask_TE[0] = False, False
    return Route.from_mask(mask_TE, torch.rand(tokens, E, dtype=dtype).requires_grad_())


def top_k(tokens: int, k: int = 2) -> Route:
    """K experts per token; expert 2 gets none."""
    allowed = torch.tensor([0, 1, 3, 4])
    ids_TK = allowed[torch.rand(tokens, 4).argsort(1)[:, :k]]
    return Route.from_top_k(ids_TK, torch.rand(tokens, k).requires_grad_(), E)


def run(engine: str, route: Route, xs: list[Tensor], activation: Activation = "swiglu") -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x, up, down and the combine weights."""
    weight_N = route.weight.detach().requires_grad_()
    y = expert_mlp(xs[0], route.with_weight(weight_N), xs[1], xs[2], activation, engine)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return y, list(torch.autograd.grad(y, [*xs, weight_N], towards))


def assert_like_reference(
    engine: str, route: Route, xs: list[Tensor], activation: Activation = "swiglu", tolerance: float = 1e-5
) -> None:
    y, gradients = run(engine, route, xs, activation)
    exact, exact_gradients = run("reference", route, xs, activation)
    assert y.dtype == xs[0].dtype and [g.dtype for g in gradients] == [g.dtype for g in exact_gradients]
    for one, other in zip([y, *gradients], [exact, *exact_gradients], strict=True):
        scale = max(1.0, float(other.detach().abs().max()) if other.numel() else 1.0)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("route", [ragged, top_k])
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("engine", FAST)
def test_engines_agree_with_the_reference(
    engine: str, dtype: torch.dtype, tolerance: float, activation: Activation, route: Callable[[int], Route]
) -> None:
    assert_like_reference(engine, route(40), operands(40, activation, dtype), activation, tolerance)


@pytest.mark.parametrize("route", [ragged, top_k])
@pytest.mark.parametrize("engine", FAST)
def test_engines_agree_in_bf16_where_segments_are_padded(engine: str, route: Callable[[int], Route]) -> None:
    edges = route(203)
    assert len(pad_segments(edges).token) > len(edges.token)
    assert_like_reference(engine, edges, operands(203, dtype=torch.bfloat16), tolerance=0.03)


class Shapes(TorchDispatchMode):
    """Collects the shapes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.seen.add(tuple((tuple(arg.shape), arg.stride()) for arg in args if isinstance(arg, Tensor)))
        return func(*args, **(kwargs or {}))


def test_bf16_products_on_a_cpu_come_in_few_shapes() -> None:
    """oneDNN compiles a kernel for each: see ``pad_segments``."""
    shapes = {}
    for dtype in (torch.float32, torch.bfloat16):
        xs = operands(600, dtype=dtype)
        with Shapes() as found:
            for _ in range(20):
                run("streaming", ragged(600), xs)
        shapes[dtype] = len(found.seen)
    assert 2 * shapes[torch.bfloat16] < shapes[torch.float32]


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("engine", FAST)
def test_engines_take_few_tokens(engine: str, tokens: int) -> None:
    assert_like_reference(engine, top_k(tokens), operands(tokens))
    assert_like_reference(engine, top_k(tokens, k=1), operands(tokens))


@pytest.mark.parametrize("engine", ON_CPU)
def test_no_edges_give_zeros_and_zero_gradients(engine: str) -> None:
    xs, mask_TE = operands(4), torch.zeros(4, E, dtype=torch.bool)
    route = Route.from_mask(mask_TE, torch.rand(4, E, requires_grad=True))
    y = expert_mlp(xs[0], route, xs[1], xs[2], "swiglu", engine)
    assert torch.equal(y, torch.zeros_like(y))
    if y.requires_grad:
        gradients = torch.autograd.grad(y.sum(), xs, allow_unused=True, materialize_grads=True)
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("engine", FAST)
def test_an_expert_without_tokens_gets_a_zero_gradient(engine: str) -> None:
    _, gradients = run(engine, top_k(30), operands(30))
    for gradient in gradients[1:3]:
        assert torch.equal(gradient[2], torch.zeros_like(gradient[2])) and bool(gradient[3].any())


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_streaming_has_the_gradient_of_what_it_computes(activation: Activation) -> None:
    route = Route.from_mask(torch.tensor([[1, 1], [0, 0], [0, 1]]).bool(), torch.rand(3, 2, dtype=torch.float64))
    shapes = [(3, 2), (2, 4, 2), (2, 2, 2)]
    xs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def compute(x: Tensor, up: Tensor, down: Tensor, weight_N: Tensor) -> Tensor:
        return expert_mlp(x, route.with_weight(weight_N), up, down, activation, "streaming")

    assert torch.autograd.gradcheck(compute, (*xs, route.weight.requires_grad_()))


def test_streaming_in_many_chunks_is_streaming_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    xs, route = operands(400), ragged(400, 0.8)
    monkeypatch.setattr(streaming, "CACHE_BYTES", 1)
    assert int(route.counts.max()) > 3 * streaming._rows_per_chunk(xs[0], xs[1])
    assert_like_reference("streaming", route, xs)


@pytest.mark.parametrize("engine", FAST)
def test_a_broadcast_output_gradient_is_taken(engine: str) -> None:
    xs, route = operands(), top_k(40)
    ours, theirs = (
        torch.autograd.grad(expert_mlp(xs[0], route, xs[1], xs[2], "swiglu", name).sum(), xs)
        for name in (engine, "reference")
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ON_CPU)
def test_autocast_computes_in_bf16_and_keeps_float32_gradients(engine: str) -> None:
    xs, route = operands(), top_k(40)
    with torch.autocast("cpu", torch.bfloat16):
        y, gradients = run(engine, route, xs)
    assert y.dtype == torch.bfloat16 and {gradient.dtype for gradient in gradients} == {torch.float32}
    exact, exact_gradients = run("reference", route, xs)
    for one, other in zip([y, *gradients], [exact, *exact_gradients], strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.1, atol=0.03 * float(other.detach().abs().max()))


def saved_bytes(engine: str, route: Route, xs: list[Tensor], activation: Activation) -> int:
    """Bytes that autograd keeps between the passes, without x and the weights."""
    own, kept = {tensor.data_ptr() for tensor in xs}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = expert_mlp(xs[0], route, xs[1], xs[2], activation, engine)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("route", [ragged, top_k])
@pytest.mark.parametrize("engine", FAST)
def test_about_4h_bytes_are_kept_per_edge(engine: str, route: Callable[[int], Route]) -> None:
    width = 64
    edges, xs = route(500), operands(500, "swiglu", torch.bfloat16, width)
    count = len(edges.token)
    kept = saved_bytes(engine, edges, xs, "swiglu")
    assert 4 * width * count <= kept <= (4 * width + 32) * count
    assert 2 * kept < saved_bytes("reference", edges, xs, "swiglu")


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activation_gradients(activation: Activation) -> None:
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    out = activate(z, activation)
    towards = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, z, towards)
    torch.testing.assert_close(activate_backward(towards, z.detach(), activation), expected)


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    xs = operands()
    with pytest.raises(UserError, match=r"no engine 'fast'\. Valid: auto, reference, streaming, grouped, native"):
        expert_mlp(xs[0], top_k(40), xs[1], xs[2], "swiglu", "fast")


@pytest.mark.parametrize(
    ("dtype", "d_model", "width", "reason"),
    [
        (torch.float32, 6, 8, "a row of 6 values is no multiple of 16 bytes"),
        (torch.float32, 8, 2, "a row of 2 values is no multiple of 16 bytes"),
        (torch.bfloat16, 8, 4, "a row of 4 values is no multiple of 16 bytes"),
        (torch.float64, 8, 8, "grouped_mm has no torch.float64"),
    ],
)
def test_grouped_says_why_it_cannot(dtype: torch.dtype, d_model: int, width: int, reason: str) -> None:
    x, up, down = torch.randn(3, d_model), torch.randn(E, 2 * width, d_model), torch.randn(E, d_model, width)
    with pytest.raises(UserError, match=f"engine 'grouped' cannot run here: {reason}. Use engine=streaming"):
        expert_mlp(x.to(dtype), top_k(3), up.to(dtype), down.to(dtype), "swiglu", "grouped")


@pytest.mark.parametrize(("d_model", "dtype", "picked"), [(64, "float32", "grouped"), (512, "float32", "streaming")])
def test_auto_without_native_goes_by_the_size_of_an_expert_and_says_so(
    d_model: int, dtype: str, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda *operands: "no compiler")
    x = torch.empty(3, d_model, dtype=getattr(torch, dtype), device="cpu")
    name, reason = choose(x, x.new_empty(2, 4 * d_model, d_model), x.new_empty(2, d_model, 2 * d_model))
    assert name == picked and "CPU" in reason


def test_auto_never_takes_what_cannot_run_and_asking_overrides_it() -> None:
    xs = operands()
    double = [tensor.double() for tensor in xs]
    assert choose(*double) == ("streaming", "grouped cannot: grouped_mm has no torch.float64")
    assert choose(*xs, "streaming") == ("streaming", "asked for")


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_at_all(engine: str, dtype: torch.dtype) -> None:
    xs = operands(0, dtype=dtype)
    y, gradients = run(engine, top_k(0), xs)
    assert y.shape == (0, D) and y.dtype == dtype
    assert all(gradient.abs().sum() == 0 for gradient in gradients)
