"""A gate of queries and keys: what ``select: product_keys`` reads."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.bank import matrix
from moeforge.moe.context import Context
from moeforge.moe.gates.signal import Signal, in_float32
from moeforge.moe.select import check_groups


class QueryGate(nn.Module):
    """logits of group g = keys_g norm(Q_g x): the logits fall into equal groups with a query each."""

    initialised = ("core",)

    def __init__(self, config: "Query", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.config, size = config, config.group_size(num_experts)
        self.query = matrix(config.queries * config.d_query, d_model)
        self.keys = matrix(config.key_sets or config.queries, size, config.d_query)
        # Around one, so that its best approximation of rank one is a good one from the start.
        self.core = nn.Parameter(1 + torch.randn(config.rank, config.rank) / 10) if config.rank else None
        self.times = {"keys": config.queries // len(self.keys), "core": size * config.heads}

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        query_TGQ = nn.functional.linear(in_float32(x_TD), in_float32(self.query)).unflatten(
            1, (self.config.queries, -1)
        )
        if self.config.norm:
            query_TGQ = nn.functional.rms_norm(query_TGQ, query_TGQ.shape[-1:])
        keys_GSQ = in_float32(self.keys).repeat(self.times["keys"], 1, 1)
        logits_TGS = torch.einsum("tgq,gsq->tgs", query_TGQ, keys_GSQ)
        logits_TGS = logits_TGS if self.core is None else self._cored(logits_TGS, in_float32(self.core))
        return Signal(logits_TGS.flatten(1))

    def _cored(self, logits_TGS: Tensor, core_RR: Tensor) -> Tensor:
        """Of each head's half, the logits that name candidates, then ``rank`` that score them."""
        row_THRS, column_THRS = logits_TGS.unflatten(1, (-1, 2, self.config.rank)).unbind(2)
        left_RR, _, right_RR = torch.linalg.svd(core_RR.detach())
        sign = torch.where(left_RR[:, 0].sum() < 0, -1, 1)  # of the pair, either sign is a decomposition
        candidate_TH1S = torch.einsum("thrs,r->ths", row_THRS, sign * left_RR[:, 0])[:, :, None]
        row_THRS = torch.cat([candidate_TH1S, torch.einsum("thrs,rq->thqs", row_THRS, core_RR)], 2)
        candidate_TH1S = torch.einsum("thrs,r->ths", column_THRS, sign * right_RR[0])[:, :, None]
        return torch.stack([row_THRS, torch.cat([candidate_TH1S, column_THRS], 2)], 2)


class Query(Config):
    """Queries and keys: with ``select: product_keys`` each head has two queries (arXiv:1907.05242, section 3.1)."""

    type: Literal["query"] = "query"
    queries: int = Field(2, ge=1)
    """Groups of logits, in order, each with its own query."""
    d_query: int = Field(32, ge=1)
    """Width of a query and of a key."""
    key_sets: int | None = Field(None, ge=1)
    """Queries take turns among so many sets of keys; 2 lets all heads share theirs. Null: a set for each query."""
    norm: bool = True
    """RMSNorm of each query."""
    rank: int = Field(0, ge=0)
    """Above 0, each half of a head has so many queries and a learned core says how row and column vectors multiply
    (Tucker-decomposed keys, arXiv:2411.12364); ``select`` must have the same rank."""

    @property
    def heads(self) -> int:
        """Groups of 2 * ``rank`` queries."""
        return self.queries // (2 * self.rank) if self.rank else 0

    def group_size(self, num_experts: int) -> int:
        """Logits of one query; with a core, those that name candidates are made of the others."""
        return num_experts // (self.queries + 2 * self.heads)

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return QueryGate(self, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the logits cannot form the groups, or the queries cannot take turns."""
        check_groups(self.queries, 2 * self.rank or 1, "2 * gate.rank", what="gate.queries")
        check_groups(num_experts, self.queries + 2 * self.heads, "gate.queries")
        check_groups(self.queries, self.key_sets or 1, "gate.key_sets", what="gate.queries")
