"""A gate made of gates."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config, slot
from moeforge.moe.bank import matrix
from moeforge.moe.context import Context
from moeforge.moe.gates.row import MLP, Cosine, Distance, Linear
from moeforge.moe.gates.signal import Signal, in_float32
from moeforge.moe.select import check_groups


class PathsGate(nn.Module):
    """log softmax(x W)_p + log softmax(gate_p(x))_e: the share of a path, times that of an expert of its own."""

    def __init__(self, config: "Paths", d_model: int, num_experts: int) -> None:
        super().__init__()
        count = len(config.parts)
        self.parts = nn.ModuleList(part.build(d_model, num_experts // count) for part in config.parts)
        self.share = matrix(count, d_model)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E], and the sum of what the parts want small."""
        share_TP = nn.functional.linear(in_float32(x_TD), in_float32(self.share)).log_softmax(-1)
        signals = [part(x_TD, context) for part in self.parts]
        shares = zip(share_TP.split(1, 1), signals, strict=True)
        losses = [signal.loss for signal in signals if signal.loss is not None]
        logits_TE = torch.cat([share_T1 + signal.logits.log_softmax(-1) for share_T1, signal in shares], 1)
        return Signal(logits_TE, loss=torch.stack(losses).sum(0) if losses else None)


class Paths(Config):
    """Paths of equally many experts, in order, each with a gate of its own, and learned shares of the paths.

    With ``select: top_per_group`` every row takes every path (arXiv:2411.19402 has a continuous and a discrete one).
    """

    type: Literal["paths"] = "paths"
    parts: tuple[slot(Linear, Cosine, MLP, Distance), ...] = Field(min_length=2)  # type: ignore[valid-type]
    """The gate of each path."""

    @property
    def hands_loss(self) -> bool:
        """Whether a part does."""
        return any(getattr(part, "hands_loss", False) for part in self.parts)

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return PathsGate(self, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the experts cannot form the paths, or a part remembers over layers."""
        check_groups(num_experts, len(self.parts), "paths in gate.parts")
        if any(getattr(part, "previous", False) for part in self.parts):
            raise ValueError("gate: paths hands no state on: set previous: false in its parts")
