"""Gates that ask the experts themselves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.bank import Bank, matrix
from moeforge.moe.context import Context
from moeforge.moe.gates.signal import Signal, in_float32
from moeforge.moe.schedule import Scheduled, at

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig


def asked(context: Context, gate: str) -> Sequence[Bank]:
    """The layer's banks. Raises ValueError where a router was called without its layer."""
    if context.banks is None:
        raise ValueError(f"gate: {gate} asks the experts, and the context has no banks: call the layer's route()")
    return context.banks


def refuse_slots(gate: Any, router: "RouterConfig") -> None:
    """Raises ValueError for a selector that wants other logits than experts can give, one for each."""
    if not router.select.scores_experts:
        raise ValueError(f"gate: {gate.type} has one logit per expert, select: {router.select.type} wants others")


class ActivationNormGate(nn.Module):
    """logits = |A_e x|, the norm of what an expert would compute first (Autonomy-of-Experts, arXiv:2501.13074)."""

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        return Signal(torch.cat([bank.first_norms(in_float32(x_TD)) for bank in asked(context, "activation_norm")], 1))


class ActivationNorm(Config):
    """No router: the experts that a row excites most take it. They must be ``experts: {type: low_rank}``."""

    type: Literal["activation_norm"] = "activation_norm"
    asks_experts: ClassVar[bool] = True

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return ActivationNormGate()

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError where it could not be asked for one logit per expert."""
        refuse_slots(self, router)

    def check_banks(self, experts: Sequence[Any]) -> None:
        """Raises ValueError for experts that have no cheap first activation."""
        deaf = [bank.type for bank in experts if not hasattr(bank, "first_cost")]
        if deaf:
            raise ValueError(f"gate: activation_norm asks experts of type low_rank; these are {deaf[0]}")

    def expert_work(self, experts: Sequence[Any], d_model: int) -> int:
        """Multiplications per token with weights of experts: those of the chosen ones are done again."""
        return sum(bank.first_cost(d_model) for bank in experts)


class CompetitionGate(nn.Module):
    """A linear gate, but in a share of the training passes logits = |E_e(x)|, over all experts (arXiv:2402.02526).

    What the gate wants small is, in those passes, the squared difference between its own softmax and the norms'.
    """

    def __init__(self, share: Scheduled, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.share, self.weight = share, matrix(num_experts, d_model)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E], and the loss [T], zero where nothing was learned of the experts."""
        guess_TE = nn.functional.linear(in_float32(x_TD), in_float32(self.weight))
        if not context.training or torch.rand(()).item() >= at(self.share, context.step):
            return Signal(guess_TE, loss=guess_TE.new_zeros(len(guess_TE)))
        outputs_ETD = torch.cat([bank.everywhere(x_TD) for bank in asked(context, "competition")])
        norm_TE = in_float32(outputs_ETD).norm(dim=-1).T
        missed_TE = guess_TE.softmax(-1) - norm_TE.detach().softmax(-1)
        return Signal(norm_TE, loss=missed_TE.square().sum(-1))


class Competition(Config):
    """The experts that answer loudest win, and a cheap router learns to foresee it; outside training it decides alone.

    A pass in which they compete computes every expert on every row, which FLOPs per token leave out.
    """

    type: Literal["competition"] = "competition"
    asks_experts: ClassVar[bool] = True
    hands_loss: ClassVar[bool] = True
    share: Scheduled = 0.05
    """Of the training passes of this layer, drawn by lot."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return CompetitionGate(self.share, d_model, num_experts)

    @model_validator(mode="after")
    def _happens(self) -> Self:
        if self.share == 0:
            raise ValueError("share = 0: experts that never compete leave gate: linear")
        return self

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError where the router would not learn, or could not be asked for one logit per expert."""
        refuse_slots(self, router)
        if all(loss.type != "gate_loss" for loss in router.losses):
            raise ValueError("gate: competition teaches its router by losses: gate_loss, which is not there")
