"""Compiles the Triton programs for a GPU that need not be there: ``python triton_machine_code.py 90 bfloat16 swiglu``.

The engine runs as it would, forward and backward, up to the launch itself, which does nothing. Prints one JSON line for
each program compiled: name, registers of a thread, bytes spilled to its stack, and which matrix instruction it uses.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from moeforge.kernels.activation import is_gated
from moeforge.kernels.edges import EdgeTensors
from moeforge.kernels.triton import backward, forward

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


class AbsentGPU:
    """What Triton asks of a driver: it says which GPU it is, takes machine code, and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability, self.utils = capability, self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.capability]}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            listing = _tool("nvdisasm", file.name)
        found = dict(word.split(":") for word in usage.split() if word.startswith(("REG:", "STACK:")))
        unit = next((unit for unit in ("HGMMA", "HMMA") if unit in listing), None)
        registers, stack = int(found["REG"]), int(found["STACK"])
        print(json.dumps({"name": name, "registers": registers, "stack": stack, "unit": unit, "shared": shared}))
        return object(), 0, registers, stack, 1024

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""


def _tool(name: str, *arguments: str) -> str:
    tool = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def main(capability: str, dtype: str, activation: Any, tokens: int = 64, d_model: int = 64, width: int = 64) -> None:
    triton.runtime.driver.set_active(AbsentGPU(int(capability)))
    x_TD = torch.zeros(tokens, d_model, dtype=getattr(torch, dtype))
    up, down = x_TD.new_zeros(2, (1 + is_gated(activation)) * width, d_model), x_TD.new_zeros(2, d_model, width)
    token_N = torch.arange(tokens)
    ends_E = torch.tensor([tokens // 2, tokens], dtype=torch.int32)
    edges = EdgeTensors(token_N, torch.ones(tokens), ends_E, tokens)
    y_TD, z_NH = forward(x_TD, edges, up, down, activation)
    backward(y_TD, x_TD, z_NH, edges, up, down, activation)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
