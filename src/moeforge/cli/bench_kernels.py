"""What ``moeforge bench kernels`` measures: a layer's experts, forward and backward, in every engine and peer."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from moeforge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.moe import Route

ENGINES = ("native", "streaming", "grouped")
LOOP = "sorted loop"
GROUP = 32
"""Inputs that share a scale."""
DENSE = "dense"
"""One MLP of width top_k * d_expert on the same tokens: the same FLOPs, and at one token the same bytes."""


@dataclass(frozen=True)
class Case:
    """One row of the table; ``most`` and ``least`` are its targets: ratio to dense, times the best peer."""

    num_experts: int
    top_k: int
    d_model: int
    d_expert: int
    tokens: int
    dtype: str = "bfloat16"
    backward: bool = False
    bits: Literal[0, 8, 4] = 0
    rows: Literal["bf16", "int8"] = "bf16"
    """What quantised weights are multiplied with."""
    most: float | None = None
    least: float | None = None
    reads: float | None = None
    """Target for the weights of the experts hit over the time taken, as a share of what memory gives."""

    @property
    def name(self) -> str:
        """As ``--case`` finds it."""
        shape = f"E{self.num_experts} k{self.top_k} D{self.d_model} H{self.d_expert} T{self.tokens}"
        weights = f"int{self.bits} weights {self.rows} rows " if self.bits else ""
        return f"{shape} {self.dtype} {weights}{'forward + backward' if self.backward else 'forward'}"


CASES = (
    Case(64, 8, 1024, 512, 2048, most=1.4, least=2.2),
    Case(64, 8, 1024, 512, 2048, backward=True, most=1.8, least=1.7),
    Case(64, 8, 1024, 512, 64, least=2.0, reads=0.8),
    Case(64, 8, 1024, 512, 1, most=1.2, least=1.25),
    Case(8, 2, 1024, 1792, 2048, most=1.3, least=1.3),
    Case(8, 2, 1024, 1792, 2048, backward=True, most=1.5, least=1.15),
    Case(64, 8, 1024, 512, 2048, "float32", backward=True, most=1.4, least=1.25),
    Case(64, 8, 1024, 512, 1, bits=8, least=2.0, reads=0.75),
    Case(64, 8, 1024, 512, 1, bits=8, rows="int8", least=2.0, reads=0.75),
    Case(64, 8, 1024, 512, 1, bits=4, least=2.0, reads=0.65),
    Case(64, 8, 1024, 512, 1, bits=4, rows="int8", least=2.0, reads=0.65),
    Case(64, 8, 1024, 512, 64, backward=True),
    Case(64, 8, 1024, 512, 1, backward=True),
    Case(16, 1, 64, 128, 4096, "float32", backward=True),
    Case(16, 1, 64, 128, 4096, backward=True),
    Case(64, 8, 512, 256, 2048, backward=True),
)
"""The targets are those of two cores; the last rows are what ``auto`` decides on besides."""


def chosen(words: list[str]) -> list[Case]:
    """The cases whose name contains any of the words; all for none. Raises UserError where none does."""
    found = [case for case in CASES if not words or any(word in case.name for word in words)]
    if not found:
        raise UserError(f"no case is called like {words}. There are: {'; '.join(case.name for case in CASES)}")
    return found


def measure(cases: list[Case], rounds: int, keep_memory: bool) -> dict[str, Any]:
    """Limits of the machine, then for each case: milliseconds, ratios and the bytes kept for backward."""
    from moeforge.kernels.allocator import keep_freed_memory

    if keep_memory and not keep_freed_memory():
        raise UserError("this system's allocator cannot be told to keep freed memory: use --allocator default")
    found: dict[str, Any] = {"limits": limits(), "cases": {}}
    for number, case in enumerate(cases):
        print(f"{number + 1} of {len(cases)}: {case.name}", file=sys.stderr, flush=True)
        found["cases"][case.name] = _measure(case, rounds)
    return found


def limits() -> dict[str, float]:
    """What the machine can do: GB/s read from memory, GFLOP/s of square products in both types."""
    import torch

    words = torch.ones(1 << 27)
    found = {"read GB/s": words.nbytes / _best(words.sum) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        found[f"{str(dtype)[6:]} GFLOP/s"] = 2 * 2048**3 / _best(lambda a=a, b=b: a @ b.T) / 1e9
    return found


def _best(run: Callable[[], object]) -> float:
    return min(_seconds(run) for _ in range(7))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _measure(case: Case, rounds: int) -> dict[str, Any]:
    variants, kept, hit_bytes = _variants(case)
    milliseconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds * (1 if case.tokens > 64 or case.backward else 5) + 1):
        for name, run in variants.items():
            taken = _seconds(run)
            if number:  # the first round warms up
                milliseconds[name].append(taken * 1e3)
    rows: dict[str, dict[str, Any]] = {}
    for name, taken in milliseconds.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(one / dense for one, dense in zip(taken, milliseconds[DENSE], strict=True))
        rows[name] = {"median_ms": middle, "quartiles_ms": [low, high], "over_dense": ratio}
        rows[name] |= {"kept_bytes_per_edge": kept[name]} if name in kept else {}
    peers = [name for name in rows if name not in (*ENGINES, DENSE)]
    best = min(peers, key=lambda name: rows[name]["median_ms"])
    ours = "native" if "native" in rows else "streaming"
    return {
        "variants": rows,
        "ours": ours,
        "over_dense": rows[ours]["over_dense"],
        "best_peer": best,
        "times_best_peer": rows[best]["median_ms"] / rows[ours]["median_ms"],
        "weights_gb_per_s": hit_bytes / rows[ours]["median_ms"] / 1e6,
        "target_over_dense": case.most,
        "target_share_of_memory": case.reads,
        "target_times_best_peer": case.least,
    }


def _variants(case: Case) -> tuple[dict[str, Callable[[], object]], dict[str, float], int]:
    """(what to time, bytes that autograd keeps per edge, bytes of the experts that are hit)."""
    import torch

    from moeforge.kernels import expert_mlp
    from moeforge.moe import Route

    torch.manual_seed(0)
    dtype, shape = getattr(torch, case.dtype), (case.num_experts, case.d_model, case.d_expert)
    x_TD = torch.randn(case.tokens, case.d_model).to(dtype)
    up_EHD = (torch.randn(shape[0], 2 * shape[2], shape[1]) / case.d_model**0.5).to(dtype)
    down_EDH = (torch.randn(shape) / case.d_expert**0.5).to(dtype)
    ids_TK = torch.rand(case.tokens, case.num_experts).argsort(1)[:, : case.top_k]
    weights_TK = torch.rand(case.tokens, case.top_k)
    route = Route.from_top_k(ids_TK, weights_TK, case.num_experts)
    if case.bits:
        return _quantised_variants(case, x_TD, route, up_EHD, down_EDH)
    operands = [tensor.requires_grad_(case.backward) for tensor in (x_TD, up_EHD, down_EDH)]
    outputs: dict[str, Callable[[], Tensor]] = {DENSE: _dense(case, x_TD)}
    for name in _engines(x_TD, up_EHD, down_EDH):
        outputs[name] = lambda name=name: expert_mlp(x_TD, route, up_EHD, down_EDH, "swiglu", name)
    outputs[LOOP] = lambda: _sorted_loop(x_TD, route, up_EHD, down_EDH)
    if find_spec("transformers") is not None:
        outputs |= _transformers(case, x_TD, up_EHD, down_EDH, ids_TK, weights_TK)
    dy_TD = torch.randn_like(x_TD)
    variants = {name: _step(output, operands, dy_TD if case.backward else None) for name, output in outputs.items()}
    kept = (
        {name: _kept(output, operands) / len(route.token) for name, output in outputs.items()} if case.backward else {}
    )
    hit = int((route.counts > 0).sum()) * 3 * case.d_model * case.d_expert * x_TD.element_size()
    return variants, kept, hit


def _quantised_variants(
    case: Case, x_TD: "Tensor", route: "Route", up_EHD: "Tensor", down_EDH: "Tensor"
) -> tuple[dict[str, Callable[[], object]], dict[str, float], int]:
    """The same for quantised weights: ours, and torch's product for them, one call per matrix."""
    from moeforge.kernels.native import expert_mlp_quantised, quantise

    assert case.bits
    up, down = (quantise(weight, case.bits, GROUP) for weight in (up_EHD, down_EDH))
    variants = {
        DENSE: _step(_dense(case, x_TD), [], None),
        "native": lambda: expert_mlp_quantised(x_TD, route, up, down, "swiglu", case.rows),
        f"torch int{case.bits}pack_mm": _torch_quantised(case, x_TD, route, up_EHD, down_EDH),
    }
    return variants, {}, (up.nbytes + down.nbytes) * int((route.counts > 0).sum()) // case.num_experts


def _torch_quantised(case: Case, x_TD: "Tensor", route: "Route", *matrices: "Tensor") -> Callable[[], object]:
    import torch

    from moeforge.kernels.activation import activate
    from moeforge.kernels.edges import segments

    aten = torch.ops.aten
    products = []
    for weight_EOI in matrices:
        num_experts, outputs, inputs = weight_EOI.shape
        if case.bits == 8:
            codes = torch.randint(-127, 128, weight_EOI.shape, dtype=torch.int8)
            scales = torch.rand(outputs).bfloat16()
            products.append([lambda x, w=w, s=scales: torch._weight_int8pack_mm(x, w, s) for w in codes])
        else:
            codes = torch.randint(0, 16, weight_EOI.shape, dtype=torch.int32)
            packed = [aten._convert_weight_to_int4pack_for_cpu(codes[e], 2) for e in range(num_experts)]
            scales = torch.rand(inputs // GROUP, outputs, 2).bfloat16()
            products.append([lambda x, w=w, s=scales: aten._weight_int4pack_mm_for_cpu(x, w, GROUP, s) for w in packed])
    up, down = products

    def run() -> "Tensor":
        rows_ND = route.gather(x_TD)
        parts = [down[e](activate(up[e](rows_ND[low:high]), "swiglu")) for e, low, high in segments(route.ends)]
        return route.combine(torch.cat(parts))

    return run


def _engines(*operands: "Tensor") -> list[str]:
    from moeforge.kernels import ENGINES as TABLE

    return [name for name in ENGINES if (engine := TABLE[name]) and engine.why_not(*operands) is None]


def _dense(case: Case, x_TD: "Tensor") -> "Callable[[], Tensor]":
    import torch

    from moeforge.kernels.activation import activate

    width = case.top_k * case.d_expert
    up, down = torch.randn(2 * width, case.d_model), torch.randn(case.d_model, width)
    up, down = ((m / m.shape[1] ** 0.5).to(x_TD.dtype).requires_grad_(case.backward) for m in (up, down))
    linear = torch.nn.functional.linear
    return lambda: linear(activate(linear(x_TD, up), "swiglu"), down)


def _sorted_loop(x_TD: "Tensor", route: "Route", up_EHD: "Tensor", down_EDH: "Tensor") -> "Tensor":
    """What one writes first: sort, then two products per expert. Unbound once: an index for each expert would make a
    gradient of all of them for each."""
    import torch

    from moeforge.kernels.activation import activate
    from moeforge.kernels.edges import segments

    rows_ND, up_E, down_E = route.gather(x_TD), up_EHD.unbind(), down_EDH.unbind()
    parts = [activate(rows_ND[low:high] @ up_E[e].T, "swiglu") @ down_E[e].T for e, low, high in segments(route.ends)]
    return route.combine(torch.cat(parts))


def _transformers(case: Case, x: "Tensor", up: "Tensor", down: "Tensor", *route: "Tensor") -> dict[str, Any]:
    """Its experts as they come; ``eager`` only forward: its backward makes all experts' gradient for each expert."""
    from moeforge.hub.bridge import olmoe_experts

    names = ("grouped_mm",) if case.backward else ("grouped_mm", "eager")
    ids_TK, weights_TK = route[0], route[1].to(x.dtype)
    peers = {name: olmoe_experts(name, up, down, case.top_k) for name in names}
    return {f"transformers {name}": lambda peer=peer: peer(x, ids_TK, weights_TK) for name, peer in peers.items()}


def _step(output: "Callable[[], Tensor]", operands: "list[Tensor]", dy_TD: "Tensor | None") -> Callable[[], object]:
    """One pass, or both; gradients are made anew each time, as after ``zero_grad(set_to_none=True)``."""
    import torch

    def infer() -> None:
        with torch.no_grad():
            output()

    def train() -> None:
        output().backward(dy_TD)
        for operand in operands:
            operand.grad = None

    return infer if dy_TD is None else train


def _kept(output: "Callable[[], Tensor]", operands: "list[Tensor]") -> int:
    """Bytes that autograd keeps for backward, less the operands'."""
    from torch.autograd.graph import saved_tensors_hooks

    own = {tensor.untyped_storage().data_ptr() for tensor in operands}
    sizes: dict[int, int] = {}

    def keep(tensor: "Tensor") -> "Tensor":
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = output()
    kept = sum(size for address, size in sizes.items() if address not in own)
    del result
    return kept


def show(found: dict[str, Any]) -> None:
    """The table: a line per case with its targets in brackets, then one per variant."""
    print("limits: " + ", ".join(f"{value:.0f} {name}" for name, value in found["limits"].items()))
    for name, case in found["cases"].items():
        share = case["weights_gb_per_s"] / found["limits"]["read GB/s"]
        figures = (
            f"{case['over_dense']:.2f} of dense ({case['target_over_dense'] or '-'})",
            f"{case['times_best_peer']:.2f} times {case['best_peer']} ({case['target_times_best_peer'] or '-'})",
            f"weights read at {share:.0%} of memory's speed ({case['target_share_of_memory'] or '-'})",
        )
        print(f"{name}: {case['ours']} {', '.join(figures)}")
        for variant, row in case["variants"].items():
            low, high = row["quartiles_ms"]
            kept = f", keeps {row['kept_bytes_per_edge']:.0f} bytes per edge" if "kept_bytes_per_edge" in row else ""
            print(f"  {variant:<24}{row['median_ms']:9.2f} ms ({low:.2f} to {high:.2f}){kept}")
