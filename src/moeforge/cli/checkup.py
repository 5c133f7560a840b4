"""What ``moeforge doctor`` looks at: each part tried, not assumed."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from moeforge.cli.amounts import in_bytes

if TYPE_CHECKING:
    import torch

OPTIONAL = {
    "fastapi": "serve",
    "transformers": "hf",
    "datasets": "data",
    "pyarrow": "data",
    "gguf": "gguf",
    "matplotlib": "report",
    "jinja2": "report",
    "scipy": "compress",
    "tensorboard": "track",
    "lm-eval": "eval",
    "triton": "triton",
}
"""Package to the extra that brings it."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")

Facts = dict[str, str]


def checkup() -> dict[str, Facts]:
    """Section, then name, then finding."""
    return {
        "software": _software(),
        "devices": _devices(),
        "engines": _engines(),
        "optional packages": {name: _package(name, extra) for name, extra in OPTIONAL.items()},
    }


def _software() -> Facts:
    import torch

    from moeforge import __version__
    from moeforge.kernels.allocator import keep_freed_memory

    kept = keep_freed_memory()
    return {
        "moeforge": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "torch": str(torch.__version__),
        "threads": f"{torch.get_num_threads()} for torch, {os.cpu_count()} processors",
        "allocator": "keeps freed memory (training sets it itself)"
        if kept
        else "the system's own; it cannot be set here",
    }


def _devices() -> Facts:
    import torch

    from moeforge.kernels.native.build import processor

    facts = {"cpu": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}"}
    facts["bf16 and matrix units"] = _cpu_flags(processor())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = in_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{device.name}, {in_bytes(device.total_memory)}"
    if not torch.cuda.is_available():
        facts["cuda"] = "no GPU that this torch can use"
    return facts


def _cpu_flags(has: set[str]) -> str:
    if not has:
        return "unknown: this system has no /proc/cpuinfo that lists them"
    return ", ".join(flag for flag in CPU_FLAGS if flag in has) or "none of " + ", ".join(CPU_FLAGS)


def _engines() -> Facts:
    """Every engine in both types on every kind of device, and what ``auto`` takes there."""
    import torch

    from moeforge.kernels import ENGINES, choose

    facts = {}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype in ("float32", "bfloat16"):
            for name in ENGINES:
                facts[f"{name} {device} {dtype}"] = try_engine(name, device, dtype)
            for size, d_model in {"small": 64, "large": 1024}.items():
                x_TD = torch.empty(1, d_model, device=device, dtype=getattr(torch, dtype))
                weight = torch.empty(8, d_model, d_model, device="meta")
                facts[f"auto {device} {dtype}, {size}"] = "{}: {}".format(*choose(x_TD, weight, weight))
    return facts


def try_engine(name: str, device: str, dtype: str) -> str:
    """``works``, or why not: a small case forward and backward, compared with the reference in float32."""
    import torch

    from moeforge.errors import UserError

    try:
        found = _run_engine(name, device, dtype)
    except (UserError, RuntimeError, NotImplementedError) as error:
        return f"does not run: {' '.join(str(error).split())}"
    wanted = _run_engine("reference", device, "float32")
    tolerance = 1e-4 if dtype == "float32" else 0.05
    far = [(a - b).norm() / b.norm() > tolerance for a, b in zip(found, wanted, strict=True)]
    return "WRONG RESULTS: please report this" if bool(torch.stack(far).any()) else "works"


def _run_engine(name: str, device: str, dtype: str) -> list["torch.Tensor"]:
    """Output and gradients in float32 of four experts of width 16, two for each of 12 tokens."""
    import torch

    from moeforge.kernels import expert_mlp
    from moeforge.moe.route import Route

    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 16), (4, 32, 16), (4, 16, 16))
    values = [torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes]
    x_TD, up_EHD, down_EDH = (value.requires_grad_() for value in values)
    ids_TK = torch.stack([torch.arange(12) % 4, torch.arange(1, 13) % 4], 1).to(device)
    route = Route.from_top_k(ids_TK, torch.full((12, 2), 0.5, device=device), 4)
    y_TD = expert_mlp(x_TD, route, up_EHD, down_EDH, "swiglu", name)
    y_TD.float().square().sum().backward()
    tensors = [y_TD.detach(), x_TD.grad, up_EHD.grad, down_EDH.grad]
    return [tensor.float() for tensor in tensors if tensor is not None]


def _package(name: str, extra: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed: pip install 'moeforge[{extra}]'"
