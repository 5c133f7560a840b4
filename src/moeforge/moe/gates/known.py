"""Gates that look at what a row is known to be: its token id, its task."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.bank import matrix
from moeforge.moe.context import Context, hashed
from moeforge.moe.gates.signal import Signal, in_float32


class HashGate(nn.Module):
    """The token id alone decides: nothing is learned (Hash Layers, arXiv:2106.04426)."""

    def __init__(self, config: "Hash", num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]: 0 at one expert, minus infinity elsewhere, so that its softmax score is one."""
        if context.token_ids is None:
            raise ValueError("gate: hash needs the token ids in the context")
        ids_T, common = context.token_ids, self.config.common
        drawn_T = hashed(ids_T, self.config.seed) % (self.num_experts - common) + common
        expert_T1 = torch.where(ids_T < common, ids_T, drawn_T)[:, None]
        nowhere = in_float32(x_TD).new_full((len(x_TD), self.num_experts), -torch.inf)
        return Signal(nowhere.scatter(1, expert_T1, 0.0))


class Hash(Config):
    """A fixed expert for every token id: ``select: {type: top_k, k: 1}``, no balance loss."""

    type: Literal["hash"] = "hash"
    learns: ClassVar[bool] = False
    seed: int = Field(0, ge=0)
    """Another one, another assignment."""
    common: int = Field(0, ge=0)
    """Ids below this have an expert each, others share the rest (arXiv:2311.10768): a trained tokenizer numbers single
    bytes first, then merges from frequent to rare."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return HashGate(self, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no expert is left for the other ids."""
        if self.common >= num_experts:
            raise ValueError(f"gate.common = {self.common} leaves none of num_experts = {num_experts} for other ids")


class LookupGate(nn.Module):
    """Logits by what the rows are known to be (Task-MoE, arXiv:2110.03742), added to those of the row where asked."""

    initialised = ("table",)
    looked_up: ClassVar = {"table": 1}

    def __init__(self, config: "Lookup", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.by = config.by
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.num_ids, num_experts)))
        self.weight = matrix(num_experts, d_model) if config.rows else None

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        known = context.ids if context.token_ids is None else {"token": context.token_ids, **context.ids}
        if self.by not in known:
            raise ValueError(f"gate: lookup needs {self.by} ids in the context; it has {sorted(known) or 'none'}")
        logits_TE = in_float32(self.table)[known[self.by]]
        if self.weight is not None:
            logits_TE = logits_TE + nn.functional.linear(in_float32(x_TD), in_float32(self.weight))
        return Signal(logits_TE)


class Lookup(Config):
    """One learned row of logits per token id, task, domain or modality."""

    type: Literal["lookup"] = "lookup"
    by: str = "task"
    """Which ids of the context; ``token`` is always there in a language model."""
    num_ids: int = Field(ge=1)
    """How many there are."""
    rows: bool = False
    """Also look at the row: the sum of both is a linear gate on row plus task embedding (arXiv:2204.07689)."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return LookupGate(self, d_model, num_experts)
