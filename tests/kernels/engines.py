"""The engines that run on a CPU: what tests of every engine are parametrised over."""

import torch

from moeforge.kernels import ENGINES

_X, _WEIGHT = torch.empty(1, 16, device="cpu"), torch.empty(1, 16, 16, device="cpu")
ON_CPU = [name for name, engine in ENGINES.items() if engine is None or engine.why_not(_X, _WEIGHT, _WEIGHT) is None]
