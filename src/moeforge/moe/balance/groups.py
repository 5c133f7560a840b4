"""Losses about groups of experts, and about what the gate knows of each expert."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.select import check_groups

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig, Routing


class ClusterLoss(Config):
    """Share of a token's variance of probabilities that lies inside clusters: 0 when only clusters differ.

    Experts of a cluster become alike and clusters differ, the aim of MoEC's loss (arXiv:2207.09094).
    """

    type: Literal["cluster_loss"] = "cluster_loss"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    num_groups: int = Field(2, ge=2)
    """Experts form this many equal clusters, in order."""

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when the experts cannot form the clusters."""
        check_groups(len(costs), self.num_groups, "num_groups of losses: cluster_loss")

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, per micro-batch."""
        assert routing.probs is not None
        probs_TGE = routing.probs.unflatten(1, (self.num_groups, -1))
        inside = probs_TGE.var(2, unbiased=False).mean()
        between = probs_TGE.mean(2).var(1, unbiased=False).mean()
        return inside / (inside + between).clamp_min(torch.finfo(inside.dtype).tiny)


class LocalityLoss(Config):
    """Mean of -log(probability that a token stays on its own node): LocMoE's divergence from a fully local router.

    arXiv:2401.13920. Node g holds the g-th of ``num_groups`` equal groups of experts and every num_groups-th sequence
    of a micro-batch, as data parallel ranks deal them out.
    """

    type: Literal["locality_loss"] = "locality_loss"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    num_groups: int = Field(2, ge=2)
    """Nodes."""

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when the experts cannot be dealt out evenly."""
        check_groups(len(costs), self.num_groups, "num_groups of losses: locality_loss")

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar; linear in tokens."""
        assert routing.probs is not None
        node_TG = routing.probs.unflatten(1, (self.num_groups, -1)).sum(2)
        sequence_T = torch.arange(len(node_TG), device=node_TG.device) // (len(node_TG) // batch_size)
        own_T1 = node_TG.gather(1, (sequence_T % self.num_groups)[:, None])
        return -own_T1.clamp_min(torch.finfo(own_T1.dtype).tiny).log().mean()


class EmbeddingLoss(Config):
    """diversity * |cosines of the experts' embeddings - identity| + simplicity * mean length of an embedding.

    The norm is Frobenius'; an embedding is an expert's row of the gate (DynMoE, arXiv:2405.14297).
    """

    type: Literal["embedding_loss"] = "embedding_loss"
    reads_gate: ClassVar[tuple[str, str]] = "embeddings", "weight"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    diversity: float = Field(1.0, ge=0)
    """Factor of the first."""
    simplicity: float = Field(1.0, ge=0)
    """Factor of the second."""

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError where the gate has no row per expert."""
        with torch.device("meta"):
            gate = router.gate.build(64, num_experts)
        if getattr(gate, "weight", None) is None:
            raise ValueError(f"losses: embedding_loss: gate: {router.gate.type} has no embedding of each expert")

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, of the gate alone."""
        assert routing.embeddings is not None
        rows_ED = routing.embeddings.float()
        cosines_EE = nn.functional.normalize(rows_ED, dim=1) @ nn.functional.normalize(rows_ED, dim=1).T
        alike = (cosines_EE - torch.eye(len(rows_ED), device=rows_ED.device)).norm()
        return self.diversity * alike + self.simplicity * rows_ED.norm(dim=1).mean()


class CoreLoss(Config):
    """Mean square by which singular values of the gate's core, but the first, are above ``margin``.

    Near rank one, the halves name the right candidates (arXiv:2411.12364, equation 12).
    """

    type: Literal["core_loss"] = "core_loss"
    reads_gate: ClassVar[tuple[str, str]] = "core", "core"
    weight: float = Field(0.001, gt=0)
    """Factor in the total loss."""
    margin: float = Field(0.15, ge=0)
    """How large they may be."""

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError where there is no core, or no second singular value."""
        if getattr(router.gate, "rank", 0) < 2:
            raise ValueError("losses: core_loss needs gate: query with rank of 2 or more")

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, of the gate alone."""
        assert routing.core is not None
        return (torch.linalg.svdvals(routing.core.float())[1:] - self.margin).clamp_min(0).square().mean()
