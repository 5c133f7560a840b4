"""Gate: rows -> one logit per expert. The part of a router that owns parameters.

Every gate is called with (rows [T, D], context) and gives (logits [T, E], state): the state, where there is one, goes
to the next MoE layer's router as ``context.router_state``. All decide in float32, also in a bf16 model.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config, slot
from moeforge.moe.bank import matrix
from moeforge.moe.context import Context, hashed
from moeforge.moe.select import check_groups

Signal = tuple[Tensor, Tensor | None]


def _float(tensor: Tensor) -> Tensor:
    """float32 at least; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LinearGate(nn.Module):
    """logits = x W^T (Switch Transformer, arXiv:2101.03961, section 2.4)."""

    def __init__(self, config: "Linear", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = matrix(num_experts, d_model)
        if config.orthogonal:
            nn.init.orthogonal_(self.weight)
            self.initialised = ("weight",)
        self.weight.requires_grad = not config.frozen
        self.previous = matrix(num_experts, num_experts) if config.previous else None
        self.of_token = config.reads == "token"

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        rows_TD = self._token(context) if self.of_token else _float(x_TD)
        logits_TE = nn.functional.linear(rows_TD, self.weight.to(rows_TD.dtype))
        if self.previous is None:
            return logits_TE, None
        if context.router_state is not None:
            logits_TE = logits_TE + nn.functional.linear(context.router_state, _float(self.previous))
        return logits_TE, logits_TE

    def _token(self, context: Context) -> Tensor:
        if context.embedded is None:
            raise ValueError("gate: linear with reads: token needs the tokens' embeddings in the context")
        return nn.functional.rms_norm(_float(context.embedded), context.embedded.shape[-1:])


class Linear(Config):
    """A linear gate without bias."""

    type: Literal["linear"] = "linear"
    reads: Literal["row", "token"] = "row"
    """The row, which context has been mixed into, or the token's own embedding (StableMoE, arXiv:2204.08396)."""
    frozen: bool = False
    """Stay as initialised (arXiv:2303.01610)."""
    orthogonal: bool = False
    """Start with orthogonal rows (arXiv:2401.13920)."""
    previous: bool = False
    """Add a linear map of the previous MoE layer's logits (arXiv:2410.07348); it must have as many experts."""

    @property
    def learns(self) -> bool:
        """Whether balancing can change it."""
        return not self.frozen

    def state_width(self, num_experts: int) -> int | None:
        """Of what it takes from the layer below and hands on."""
        return num_experts if self.previous else None

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return LinearGate(self, d_model, num_experts)


class CosineGate(nn.Module):
    """logits = cos(P x, w_e) / temperature, which is learned (X-MoE, arXiv:2204.09179)."""

    def __init__(self, config: "Cosine", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.project = matrix(config.d_route, d_model) if config.d_route else None
        self.weight = matrix(num_experts, config.d_route or d_model)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.bar = nn.Parameter(torch.zeros(num_experts)) if config.thresholds else None

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]; with thresholds, positive where the expert's own one is passed."""
        rows = _float(x_TD)
        if self.project is not None:
            rows = nn.functional.linear(rows, _float(self.project))
        cosine_TE = nn.functional.normalize(rows, dim=-1) @ nn.functional.normalize(_float(self.weight), dim=-1).T
        if self.bar is not None:
            cosine_TE = cosine_TE - _float(self.bar)
        return cosine_TE * _float(self.scale).exp(), None


class Cosine(Config):
    """Cosine similarity to an embedding of each expert: the length of a row plays no part."""

    type: Literal["cosine"] = "cosine"
    d_route: int | None = Field(None, ge=1)
    """Compare in a learned projection of this width; null: in d_model."""
    temperature: float = Field(0.07, gt=0)
    """Divides the cosine at the start; learned from there on."""
    thresholds: bool = False
    """Subtract a learned bar of each expert (arXiv:2405.14297); use with ``select: threshold``."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return CosineGate(self, d_model, num_experts)


class MLPGate(nn.Module):
    """logits = W2 silu(W1 x)."""

    def __init__(self, width: int, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.up, self.weight = matrix(width, d_model), matrix(num_experts, width)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        hidden = nn.functional.silu(nn.functional.linear(_float(x_TD), _float(self.up)))
        return nn.functional.linear(hidden, _float(self.weight)), None


class MLP(Config):
    """A gate with one hidden layer: experts need not be separated by planes."""

    type: Literal["mlp"] = "mlp"
    width: int = Field(64, ge=1)
    """Of the hidden layer."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return MLPGate(self.width, d_model, num_experts)


class TwoLevelGate(nn.Module):
    """log p(group) + log p(place in its group): D * (groups + places) weights (SMILE, arXiv:2212.05191)."""

    def __init__(self, num_groups: int, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.group, self.place = matrix(num_groups, d_model), matrix(num_experts // num_groups, d_model)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]; their softmax is the product of both."""
        group_TG = nn.functional.linear(_float(x_TD), _float(self.group)).log_softmax(-1)
        place_TP = nn.functional.linear(_float(x_TD), _float(self.place)).log_softmax(-1)
        return (group_TG[:, :, None] + place_TP[:, None]).flatten(1), None


class TwoLevel(Config):
    """Choose a group (a node of a cluster), then a place in it."""

    type: Literal["two_level"] = "two_level"
    num_groups: int = Field(2, ge=1)
    """Experts form this many equal groups, in order."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module. Raises ValueError when the experts cannot form the groups."""
        return TwoLevelGate(self.num_groups, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the experts cannot form the groups."""
        check_groups(num_experts, self.num_groups, "gate.num_groups")


class RecurrentGate(nn.Module):
    """h = GRU(P x, h of the layer below), logits = W h: per token, over depth (RMoE, arXiv:2408.06793)."""

    def __init__(self, d_route: int, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.project, self.weight = matrix(d_route, d_model), matrix(num_experts, d_route)
        self.cell = nn.GRUCell(d_route, d_route)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E], and the state [T, d_route] for the next layer."""
        rows = nn.functional.linear(_float(x_TD), _float(self.project))
        below = context.router_state if context.router_state is not None else torch.zeros_like(rows)
        state = torch.gru_cell(rows, below, *(_float(weight) for weight in self.cell.parameters()))
        return nn.functional.linear(state, _float(self.weight)), state


class Recurrent(Config):
    """A gate that remembers what the routers below made of the same token."""

    type: Literal["recurrent"] = "recurrent"
    d_route: int = Field(32, ge=1)
    """Width of the state; the same in every layer."""

    def state_width(self, num_experts: int) -> int:
        """Of what it takes from the layer below and hands on."""
        return self.d_route

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return RecurrentGate(self.d_route, d_model, num_experts)


class DistanceGate(nn.Module):
    """logits = -|x - c_e|^2 / sqrt(D) (Moirai-MoE, arXiv:2410.10469)."""

    def __init__(self, config: "Distance", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.centre = matrix(num_experts, d_model)
        self.centre.requires_grad = not config.frozen

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        distance_TE = torch.cdist(_float(x_TD), _float(self.centre)).square()
        return -distance_TE / x_TD.shape[1] ** 0.5, None


class Distance(Config):
    """The nearest centres."""

    type: Literal["distance"] = "distance"
    frozen: bool = False
    """Centres stay as they are set, for example by k-means."""

    @property
    def learns(self) -> bool:
        """Whether balancing can change it."""
        return not self.frozen

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return DistanceGate(self, d_model, num_experts)


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
        nowhere = _float(x_TD).new_full((len(x_TD), self.num_experts), -torch.inf)
        return nowhere.scatter(1, expert_T1, 0.0), None


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
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return HashGate(self, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no expert is left for the other ids."""
        if self.common >= num_experts:
            raise ValueError(f"gate.common = {self.common} leaves none of num_experts = {num_experts} for other ids")


class LookupGate(nn.Module):
    """Logits by what the rows are known to be (Task-MoE, arXiv:2110.03742), added to those of the row where asked."""

    initialised = looked_up = ("table",)

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
        logits_TE = _float(self.table)[known[self.by]]
        if self.weight is not None:
            logits_TE = logits_TE + nn.functional.linear(_float(x_TD), _float(self.weight))
        return logits_TE, None


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
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return LookupGate(self, d_model, num_experts)


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
        query_TGQ = nn.functional.linear(_float(x_TD), _float(self.query)).unflatten(1, (self.config.queries, -1))
        if self.config.norm:
            query_TGQ = nn.functional.rms_norm(query_TGQ, query_TGQ.shape[-1:])
        keys_GSQ = _float(self.keys).repeat(self.times["keys"], 1, 1)
        logits_TGS = torch.einsum("tgq,gsq->tgs", query_TGQ, keys_GSQ)
        return (logits_TGS if self.core is None else self._cored(logits_TGS, _float(self.core))).flatten(1), None

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
        """The module: ``(x [T, D], context) -> (logits [T, E], state)``."""
        return QueryGate(self, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the logits cannot form the groups, or the queries cannot take turns."""
        check_groups(self.queries, 2 * self.rank or 1, "2 * gate.rank", what="gate.queries")
        check_groups(num_experts, self.queries + 2 * self.heads, "gate.queries")
        check_groups(self.queries, self.key_sets or 1, "gate.key_sets", what="gate.queries")


Gate = slot(Linear, Cosine, MLP, TwoLevel, Recurrent, Distance, Hash, Lookup, Query, default=Linear)
