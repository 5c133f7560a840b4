"""A loss that is known in the backward pass: tokens whose gradient opposes that of their expert."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config
from moeforge.moe.route import Route

if TYPE_CHECKING:
    from moeforge.moe.router import Routing
    from moeforge.moe.shared import Shared


class ConflictLoss(Config):
    """Mean over tokens of the probabilities of experts that a token is in conflict with (STGC, arXiv:2406.19905).

    In conflict is an edge whose gradient has a cosine below ``threshold`` with the mean gradient of its expert; both
    are those of a linear map from rows to outputs beside the expert, so that any kind of expert will do. Gradients
    are known in the backward pass alone: the router gets its own there, and the value of the loss reads 0.
    """

    type: Literal["conflict_loss"] = "conflict_loss"
    weight: float = Field(1.0, gt=0)
    """Factor in the total loss."""
    threshold: float = Field(0.0, ge=-1, le=1)
    """Cosine below which a token is in conflict."""

    def watch(self, routing: "Routing", x_TD: Tensor, shared: "Shared | None") -> "Routing":
        """The routing with a probe at the experts' output: zeros, whose gradient is that of the output."""
        if not torch.is_grad_enabled():
            return routing
        route, probs_TE = routing.route, routing.probs
        assert isinstance(route, Route) and probs_TE is not None
        seen = (x_TD.detach(), route.token, route.expert, route.weight.detach(), route.ends)
        probe_TD, conflict = _Conflict.apply(probs_TE, *seen, self.threshold)
        return replace(routing, route=replace(route, probe=probe_TD), conflict=conflict)

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar zero with the gradient of the loss; conflicts are judged per micro-batch."""
        assert routing.probs is not None
        return routing.probs.new_zeros(()) if routing.conflict is None else routing.conflict


class _Conflict(torch.autograd.Function):
    """(probs [T, E], ...) -> (probe [T, D], loss): as one node, its backward has both gradients at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        probs_TE: Tensor,
        x_TD: Tensor,
        token_N: Tensor,
        expert_N: Tensor,
        weight_N: Tensor,
        ends_E: Tensor,
        threshold: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(probs_TE, x_TD, token_N, expert_N, weight_N, ends_E)
        ctx.threshold = threshold
        return torch.zeros_like(x_TD), probs_TE.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        probs_TE, x_TD, token_N, expert_N, weight_N, ends_E = ctx.saved_tensors
        output_TD, scale = grad_outputs
        towards_ND = output_TD[token_N].to(weight_N.dtype) * weight_N[:, None]
        in_conflict_N = agreement(towards_ND, x_TD[token_N].to(weight_N.dtype), ends_E) < ctx.threshold
        gradient_TE = torch.zeros_like(probs_TE)
        gradient_TE[token_N[in_conflict_N], expert_N[in_conflict_N]] = 1 / len(probs_TE)
        return scale * gradient_TE, *[None] * 6


def agreement(towards_ND: Tensor, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
    """[N] cosine of each edge's gradient with the mean one of its expert, for y = V x: the gradient is dy x^T.

    Edges are sorted by expert. An edge's D x D gradient is never formed: <dy x^T, G> = dy^T G x.
    """
    cosine = []
    for dy_XD, x_XD in zip(*(part.tensor_split(ends_E[:-1].tolist()) for part in (towards_ND, rows_ND)), strict=True):
        sum_DD = dy_XD.T @ x_XD
        size_X = dy_XD.norm(dim=1) * x_XD.norm(dim=1) * sum_DD.norm()
        cosine.append((dy_XD @ sum_DD * x_XD).sum(1) / size_X.clamp_min(torch.finfo(size_X.dtype).tiny))
    return torch.cat(cosine)
