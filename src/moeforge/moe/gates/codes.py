"""A gate that spells the number of an expert in bits."""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.context import Context
from moeforge.moe.gates.signal import Signal, in_float32

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig


def smooth_step(x: Tensor, width: float) -> Tensor:
    """0 up to -width / 2, 1 from width / 2 on, a cubic between them: its slope is continuous (arXiv:2106.03760)."""
    along = (x / width + 0.5).clamp(0, 1)
    return along * along * (3 - 2 * along)


class SmoothStepGate(nn.Module):
    """sum_k softmax(x V)_k * r(x W_k), r the product over bits of S or 1 - S (DSelect-k, arXiv:2106.03760).

    Each of k selectors is a distribution over experts that becomes exactly one expert where its bits have settled. What
    the gate wants small is the entropy of its selectors.
    """

    initialised = ("code",)

    def __init__(self, config: "SmoothStep", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        inputs, bits = 1 if config.static else d_model, num_experts.bit_length() - 1
        # All bits start in the middle of the step: outside it there is no slope to learn by.
        self.code = nn.Parameter(torch.randn(config.k * bits, inputs) * (0.1 * config.width / inputs**0.5))
        self.share = nn.Parameter(torch.randn(config.k, inputs) * inputs**-0.5)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E] weights that sum to one, many of them zero, and the entropy [T] of their selectors."""
        rows = in_float32(x_TD.new_ones(len(x_TD), 1) if self.config.static else x_TD)
        place_TKB = nn.functional.linear(rows, in_float32(self.code)).unflatten(1, (self.config.k, -1))
        one_TK1B = smooth_step(place_TKB, self.config.width)[:, :, None]
        bits = torch.arange(place_TKB.shape[-1], device=rows.device)
        is_one_EB = (torch.arange(self.num_experts, device=rows.device)[:, None] >> bits & 1).bool()
        selector_TKE = torch.where(is_one_EB, one_TK1B, 1 - one_TK1B).prod(-1)
        share_TK = nn.functional.linear(rows, in_float32(self.share)).softmax(-1)
        # The slope of the entropy at zero is infinite, and nothing there may move.
        entropy_T = torch.special.entr(selector_TKE.clamp_min(torch.finfo(rows.dtype).tiny)).sum((1, 2))
        return Signal((share_TK[:, :, None] * selector_TKE).sum(1), loss=entropy_T)


class SmoothStep(Config):
    """At most ``k`` experts in the end, without a discontinuity on the way: with ``losses: gate_loss``."""

    type: Literal["smooth_step"] = "smooth_step"
    hands_loss: ClassVar[bool] = True
    k: int = Field(2, ge=1)
    """Selectors, each of which settles on one expert."""
    width: float = Field(1.0, gt=0)
    """Of the step, in units of a bit's logit: narrow ones settle sooner."""
    static: bool = False
    """The same experts for every row of this layer."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return SmoothStepGate(self, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError where a code would name no expert."""
        if num_experts < 2 or num_experts & (num_experts - 1):
            raise ValueError(f"gate: smooth_step spells experts in bits: {num_experts} is none of 2, 4, 8, ...")

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError where its weights would not be taken as they are."""
        if router.score.type != "relu" or router.select.type != "threshold":
            raise ValueError("gate: smooth_step gives weights, many zero: it needs score: relu and select: threshold")
