"""Engine ``triton`` on a GPU, against ``grouped`` (torch's grouped_mm) and a dense MLP of the same arithmetic.

``python benchmarks/triton_engine.py`` writes ``triton_engine.json``: medians, and ratios to the dense MLP in the same
round. ``--tune`` tries other tiles instead and prints what each takes; a better one belongs into ``engine.TILES``.
"""

import argparse
import itertools
import sys
from collections.abc import Callable

import torch
from report import interleaved, ratios, write
from torch import Tensor

from moeforge.kernels import expert_mlp
from moeforge.kernels.activation import activate
from moeforge.kernels.triton import engine
from moeforge.moe import Route

SHAPES = {
    "64 top-8 D2048 H1024": (64, 8, 2048, 1024),
    "128 top-8 D2048 H768": (128, 8, 2048, 768),
    "8 top-2 D4096 H14336": (8, 2, 4096, 14336),
}
TOKENS = (1, 64, 2048, 16384)
TUNED = "64 top-8 D2048 H1024"
TUNE = itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (32, 64), (4, 8), (3, 4))
"""Candidates for ``engine.Tile``, in the order of its fields."""


Variant = tuple[Callable[[Tensor], Tensor], tuple[Tensor, Tensor]]


def layer(shape: tuple[int, int, int, int], tokens: int, device: str) -> dict[str, Variant]:
    """Each engine, and a dense MLP as wide as a token's experts together, in bf16: a function of x, and its weights."""
    experts, k, d_model, width = shape

    def matrix(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=torch.bfloat16).div_(sizes[-1] ** 0.5).requires_grad_()

    up, down = matrix(experts, 2 * width, d_model), matrix(experts, d_model, width)
    wide_up, wide_down = matrix(2 * k * width, d_model), matrix(d_model, k * width)
    ids_TK = torch.rand(tokens, experts, device=device).topk(k).indices
    route = Route.from_top_k(ids_TK, torch.rand(tokens, k, device=device), experts)
    return {
        "dense": (lambda x: activate(x @ wide_up.T, "swiglu") @ wide_down.T, (wide_up, wide_down)),
        "grouped": (lambda x: expert_mlp(x, route, up, down, "swiglu", "grouped"), (up, down)),
        "triton": (lambda x: expert_mlp(x, route, up, down, "swiglu", "triton"), (up, down)),
    }


def passes(variant: Variant, x: Tensor, backward: bool) -> Callable[[], None]:
    """One forward pass without gradients, or both passes; returns when the device has finished."""
    (run, weights), towards = variant, torch.randn_like(x)

    def once() -> None:
        with torch.set_grad_enabled(backward):
            y = run(x)
        if backward:
            torch.autograd.grad(y, (x, *weights), towards)
        if x.is_cuda:
            torch.cuda.synchronize()

    return once


def measure(shape: tuple[int, int, int, int], tokens: int, device: str, rounds: int) -> dict[str, object]:
    """The summary of every variant, forward and forward + backward."""
    torch.manual_seed(0)
    x = torch.randn(tokens, shape[2], device=device, dtype=torch.bfloat16, requires_grad=True)
    variants, found = layer(shape, tokens, device), {}
    for part, backward in (("forward", False), ("forward + backward", True)):
        runs = {name: passes(variant, x, backward) for name, variant in variants.items()}
        found[part] = ratios(interleaved(runs, rounds), over="dense")
    return found


def tune(device: str, rounds: int) -> None:
    """Every candidate that fits into the GPU, both passes at 2048 tokens."""
    for tile in itertools.starmap(engine.Tile, TUNE):
        engine.TILES[2] = tile
        try:
            found = measure(SHAPES[TUNED], 2048, device, rounds)
        except Exception as error:  # too large for the GPU: Triton has a class of its own for each kind
            print(tile, type(error).__name__, flush=True)
            continue
        print(tile, {name: round(summary["triton"]["ratio"], 3) for name, summary in found.items()}, flush=True)


def main() -> None:
    """Runs every shape with every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    if arguments.tune:
        tune("cuda", arguments.rounds)
        return
    results = {"gpu": torch.cuda.get_device_name()}
    for (name, shape), tokens in itertools.product(SHAPES.items(), TOKENS):
        results[f"{name}, {tokens} tokens"] = found = measure(shape, tokens, "cuda", arguments.rounds)
        print(name, tokens, {part: round(summary["triton"]["ratio"], 2) for part, summary in found.items()}, flush=True)
    write("triton_engine", results)


if __name__ == "__main__":
    main()
