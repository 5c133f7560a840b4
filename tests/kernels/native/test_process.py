"""The native engine as a guest of its process: torch's defaults, memory, threads, forks. What went wrong would kill it.

So each runs in a process of its own.
"""

import os
import subprocess
import sys

import pytest

from moeforge.kernels.native import engine

pytestmark = pytest.mark.skipif(engine.missing() is not None, reason="the native engine does not run here")

LAYER = """
import torch
from moeforge.kernels import expert_mlp
from moeforge.kernels.native import engine
from moeforge.moe import Route

def operands(tokens=600, d_model=64, d_expert=48):
    like = dict(dtype=torch.float32, device="cpu")
    shapes = (tokens, d_model), (4, 2 * d_expert, d_model), (4, d_model, d_expert)
    x, up, down = (torch.randn(shape, **like).requires_grad_() for shape in shapes)
    ids = torch.rand(tokens, 4, **like).argsort(1)[:, :2]
    return x, Route.from_top_k(ids, torch.rand(tokens, 2, **like), 4), up, down, "swiglu"

def passes(given, name="native"):
    y = expert_mlp(*given, name)
    return y, *torch.autograd.grad(y.sum(), [tensor for tensor in given if isinstance(tensor, torch.Tensor)])

def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
"""


def said(script: str, threads: int = 1) -> str:
    """What the script printed, after it ended well."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run = [sys.executable, "-c", LAYER + script]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    return done.stdout.strip()


DEFAULTS = """
given = operands()
expected = passes(given)
for dtype in (torch.bfloat16, torch.float64):
    torch.set_default_dtype(dtype)
    found = passes(given)
    assert same(found, expected) and engine._wrong(engine.open_library()) is None
torch.set_default_dtype(torch.float32)
for device in ("meta", "cpu"):
    torch.set_default_device(device)
    assert same(passes(given), expected) and engine._wrong(engine.open_library()) is None
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
    assert engine._wrong(engine.open_library()) is None
"""


def test_the_defaults_of_torch_change_nothing() -> None:
    said(DEFAULTS)


ELSEWHERE = """
from dataclasses import replace

from moeforge.errors import UserError
from moeforge.kernels.native import expert_mlp_quantised, quantise

x, route, up, down, activation = operands()

def refused(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        print(error)

for one, other in ((up.to("meta"), down), (up, down.to("meta"))):
    refused(expert_mlp, x, route, one, other, activation)
for field in ("token", "weight", "ends"):
    away = replace(route, **{field: getattr(route, field).to("meta")})
    refused(engine.infer, x, away, up, down, activation)
packed = quantise(up, 8, 32), quantise(down, 8, 32)
refused(expert_mlp_quantised, x, route, packed[0], replace(packed[1], packed=packed[1].packed.to("meta")), activation)
refused(expert_mlp_quantised, x, route, replace(packed[0], scales=packed[0].scales.to("meta")), packed[1], activation)
"""


def test_tensors_on_other_devices_are_refused() -> None:
    assert said(ELSEWHERE).splitlines() == [
        f"engine 'native' reads contiguous tensors on the CPU, and was given one of {shape} on meta"
        for shape in ("(4, 96, 64)", "(4, 64, 48)", "(1200,)", "(1200,)", "(4,)", "(64, 128)", "(96, 4)")
    ]


NO_MEMORY = """
import resource

given = operands(2_000_000, 1, 1)  # the sums of so many tokens take 256 MB, all else some 10
token = torch.zeros(1, dtype=torch.int64)
route = Route.from_edges(token, token, torch.ones(1), 2_000_000, 4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
with torch.no_grad():
    try:
        expert_mlp(given[0], route, *given[2:], "native")
    except MemoryError as error:
        print(error)
    assert expert_mlp(given[0][:5], Route.from_edges(token, token, torch.ones(1), 5, 4), *given[2:], "native").any()
"""


def test_a_lack_of_memory_is_an_exception_and_the_next_pass_works() -> None:
    assert said(NO_MEMORY) == "no memory for the experts' pass: fewer tokens at a time or fewer threads need less"


FORKED = """
import os, signal

given = operands()
expected = passes(given)
child = os.fork()
if not child:
    signal.alarm(20)  # ends the child where it hangs
    torch.set_num_threads(1)
    with torch.no_grad():
        os._exit(0 if torch.equal(expert_mlp(*given, "native"), expected[0]) else 1)
assert os.waitpid(child, 0)[1] == 0
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}))
"""


def test_a_forked_child_with_one_thread_computes_on_the_one_openmp_that_torch_loaded() -> None:
    """With more it would hang, as torch's own products do: GNU OpenMP does not survive a fork."""
    assert said(FORKED, threads=2) == "1"
