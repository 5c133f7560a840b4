"""The dense brute-force layer: every token through every expert in plain loops, weighted by a [T, E] matrix.

It reads a built layer's config and parameters and nothing else: no Route, no kernel, no selector. One entry per member
of each slot; a new member without an entry here makes the layer's tests fail.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from moeforge.config import Config
from moeforge.moe import MoE


def members(slot: Any) -> list[type[Config]]:
    """The configs of a slot's union."""
    if isinstance(slot, type) and issubclass(slot, Config):
        return [slot]
    return [found for inner in get_args(slot) for found in members(inner)]


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: torch.where(z > 0, z, 0.0),
}
POINTWISE |= {"swiglu": POINTWISE["silu"], "geglu": POINTWISE["gelu"]}

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.exp(z) / torch.exp(z).sum(1, keepdim=True),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "logits": lambda z: z,
}


def mlp(x_TD: Tensor, up_HD: Tensor, down_DH: Tensor, activation: str) -> Tensor:
    """One expert on every token."""
    z = torch.einsum("td,hd->th", x_TD, up_HD)
    if activation.endswith("glu"):
        half = z.shape[1] // 2
        a = POINTWISE[activation](z[:, :half]) * z[:, half:]
    else:
        a = POINTWISE[activation](z)
    return torch.einsum("th,dh->td", a, down_DH)


def _top_k(select: Any, scores: list[float]) -> list[int]:
    size = len(scores) // select.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(select.num_groups)]
    rank = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in groups]
    best_groups = sorted(range(len(groups)), key=lambda g: (-rank[g], g))[: select.top_groups]
    allowed = [e for g in best_groups for e in groups[g]]
    return sorted(allowed, key=lambda e: (-scores[e], e))[: select.k]


SELECTS: dict[str, Callable[[Any, list[float]], list[int]]] = {"top_k": _top_k}


def _weigh_scores(weigh: Any, chosen: list[Tensor]) -> list[Tensor]:
    total = sum(chosen) if weigh.normalize_weights else 1.0
    return [weigh.weight_scale * score / total for score in chosen]


def _weigh_softmax(weigh: Any, chosen: list[Tensor]) -> list[Tensor]:
    total = sum(torch.exp(score) for score in chosen)
    return [weigh.weight_scale * torch.exp(score) / total for score in chosen]


WEIGHS: dict[str, Callable[[Any, list[Tensor]], list[Tensor]]] = {"scores": _weigh_scores, "softmax": _weigh_softmax}


def combine_weights(moe: MoE, x_TD: Tensor) -> Tensor:
    """[T, E]: what each expert's output counts for each token; zero where it was not chosen."""
    config = moe.config.router
    scores_TE = SCORES[config.score.type](x_TD @ moe.router.gate.weight.T)
    rows = []
    for scores_E in scores_TE:
        chosen = SELECTS[config.select.type](config.select, scores_E.tolist())
        weights = WEIGHS[config.weigh.type](config.weigh, [scores_E[e] for e in chosen])
        row = [torch.zeros(()) for _ in scores_E]
        for expert, weight in zip(chosen, weights, strict=True):
            row[expert] = weight
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _mlp_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    stacks = zip(bank.gate_up_proj, bank.down_proj, strict=True)
    return [mlp(x_TD, up, down, bank.config.activation) for up, down in stacks]


BANKS: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {"mlp": _mlp_bank}

MIXES: dict[str, Callable[[Tensor | None, Tensor, Tensor], Tensor]] = {
    "sum": lambda logits, routed, shared: routed + shared,
    "gated": lambda logits, routed, shared: routed + shared / (1 + torch.exp(-logits)),
    "coefficient": lambda logits, routed, shared: (
        (torch.exp(logits[:, :1]) * routed + torch.exp(logits[:, 1:]) * shared) / torch.exp(logits).sum(1, keepdim=True)
    ),
}


def mix_experts(moe: MoE, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """[T, D] of the layer once the weight of every expert for every token is known."""
    outputs = [out for bank in moe.banks for out in BANKS[bank.config.type](bank, x_TD)]
    y_TD = torch.zeros_like(x_TD)
    for expert, out_TD in enumerate(outputs):
        y_TD = y_TD + weights_TE[:, expert, None] * out_TD
    if moe.shared is None:
        return y_TD
    shared, gate = moe.shared, moe.shared.gate
    shared_TD = mlp(x_TD, shared.mlp.gate_up_proj.weight, shared.mlp.down_proj.weight, shared.config.activation)
    logits = None if gate is None else x_TD @ gate.weight.T + (0 if gate.bias is None else gate.bias)
    return MIXES[shared.config.mix.type](logits, y_TD, shared_TD)


def layer(moe: MoE, x_TD: Tensor) -> Tensor:
    """[T, D] -> [T, D]: what ``moe(x)[0]`` must be."""
    return mix_experts(moe, x_TD, combine_weights(moe, x_TD))
