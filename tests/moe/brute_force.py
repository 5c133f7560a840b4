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


def _softmax(score: Any, z: Tensor) -> Tensor:
    if score.standardize:
        z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    z = z / score.temperature
    size = z.shape[1] // score.num_groups
    groups = [torch.exp(z[:, g * size : (g + 1) * size]) for g in range(score.num_groups)]
    return torch.cat([group / group.sum(1, keepdim=True) for group in groups], 1)


SCORES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": lambda score, z: 1 / (1 + torch.exp(-z)),
    "relu": lambda score, z: torch.where(z > 0, z, 0.0),
    "logits": lambda score, z: z,
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


def ranked(scores: list[float]) -> list[int]:
    """Experts, best first; ties by index."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))


def _top_k(select: Any, scores: list[float]) -> list[int]:
    size = len(scores) // select.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(select.num_groups)]
    counted = 1 if select.group_rank == "best" else 2
    rank = [sum(sorted((scores[e] for e in group), reverse=True)[:counted]) for group in groups]
    allowed = {e for g in ranked(rank)[: select.top_groups] for e in groups[g]}
    return [e for e in ranked(scores) if e in allowed][select.skip :][: select.k]


def _top_per_group(select: Any, scores: list[float]) -> list[int]:
    size = len(scores) // select.num_groups
    starts = range(0, len(scores), size)
    return [first + e for first in starts for e in ranked(scores[first : first + size])[: select.k]]


def _confident(select: Any, scores: list[float]) -> list[int]:
    best, *others = ranked(scores)[: select.k]
    top = scores[best]
    near = [e for e in others if top - scores[e] <= select.max_gap and scores[e] >= select.min_ratio * top]
    return [best, *near]


def _top_p(select: Any, scores: list[float]) -> list[int]:
    order = ranked(scores)[: select.max_k or len(scores)]

    def before(n: int) -> float:
        return sum(scores[e] for e in order[:n])

    needed = [n for n in range(len(order)) if scores[order[n]] > 0 and before(n) < select.p * sum(scores)]
    return order[: max(1, len(needed))]


def _threshold(select: Any, scores: list[float]) -> list[int]:
    above = [e for e, score in enumerate(scores) if score > select.bar]
    return above or ranked(scores)[: select.at_least]


SELECTS: dict[str, Callable[[Any, list[float]], list[int]]] = {
    "top_k": _top_k,
    "auxiliary": lambda select, scores: ranked(scores)[: select.k],
    "top_per_group": _top_per_group,
    "confident": _confident,
    "top_p": _top_p,
    "threshold": _threshold,
    "uncertain": lambda select, scores: ranked(scores)[: select.k],  # as outside training
    "sinkhorn": lambda select, scores: ranked(scores)[: select.k],  # as outside training
    "draw": lambda select, scores: ranked(scores)[: select.k],  # as outside training
}
"""Per token; ``random`` and ``expert_choice`` do not choose per token and have tests of their own."""


def expert_choice(select: Any, scores_TE: Tensor) -> list[list[int]]:
    """Per token, from loops over experts: each takes its best ceil(k T / E) tokens."""
    num_tokens, num_experts = scores_TE.shape
    chosen: list[list[int]] = [[] for _ in range(num_tokens)]
    for expert in range(num_experts):
        for token in ranked(scores_TE[:, expert].tolist())[: math.ceil(select.k * num_tokens / num_experts)]:
            chosen[token].append(expert)
    return chosen


def choices(select: Any, scores_TE: Tensor) -> list[list[int]]:
    """Per token, which experts."""
    if select.type == "expert_choice":
        return expert_choice(select, scores_TE)
    return [SELECTS[select.type](select, scores) for scores in scores_TE.tolist()]


def _weigh_scores(weigh: Any, chosen: list[Tensor]) -> list[Tensor]:
    total = sum(chosen) if weigh.normalize_weights and any(chosen) else 1.0
    if weigh.normalize_weights and any(chosen) and total.abs().item() < weigh.min_total:
        total = weigh.min_total
    return [weigh.weight_scale * score / total for score in chosen]


def _weigh_softmax(weigh: Any, chosen: list[Tensor]) -> list[Tensor]:
    total = sum(torch.exp(score) for score in chosen)
    return [weigh.weight_scale * torch.exp(score) / total for score in chosen]


def _weigh_ones(weigh: Any, chosen: list[Tensor]) -> list[Tensor]:
    return [(1 + score - score.detach()) / (len(chosen) if weigh.average else 1) for score in chosen]


def _weigh_complement(weigh: Any, chosen: list[Tensor]) -> list[Tensor]:
    """The mixture of all but one, as it is written: expert i stands for all chosen ones but i."""
    total = sum(chosen) if any(chosen) else 1.0
    count = len(chosen)
    without = [[(count / max(count - 1, 1)) * (one != i) for one in range(count)] for i in range(count)]
    if not any(chosen):
        return [torch.full((), count / max(count - 1, 1))] * count
    return [sum(chosen[i] / total * without[i][one] for i in range(count)) for one in range(count)]


WEIGHS: dict[str, Callable[[Any, list[Tensor]], list[Tensor]]] = {
    "scores": _weigh_scores,
    "softmax": _weigh_softmax,
    "ones": _weigh_ones,
    "complement": _weigh_complement,
}


def combine_weights(moe: MoE, x_TD: Tensor) -> Tensor:
    """[T, E]: what each expert's output counts for each token; zero where it was not chosen."""
    config = moe.config.router
    scores_TE = SCORES[config.score.type](config.score, x_TD @ moe.router.gate.weight.T)
    rows = []
    for scores_E, chosen in zip(scores_TE, choices(config.select, scores_TE), strict=True):
        weights = WEIGHS[config.weigh.type](config.weigh, [scores_E[e] for e in chosen])
        row = [torch.zeros(()) for _ in scores_E]
        for expert, weight in zip(chosen, weights, strict=True):
            row[expert] = weight
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _mlp_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    stacks = zip(bank.gate_up_proj, bank.down_proj, strict=True)
    if not (bank.config.bias or bank.config.clamp):
        return [mlp(x_TD, up, down, bank.config.activation) for up, down in stacks]
    zeros = torch.zeros(bank.config.num_experts, 1)
    biases = (bank.gate_up_bias, bank.down_bias) if bank.config.bias else (zeros, zeros)
    outputs = []
    for (up, down), up_bias, down_bias in zip(stacks, *biases, strict=True):
        z, clamp = torch.einsum("td,hd->th", x_TD, up) + up_bias, bank.config.clamp
        half = z.shape[1] // 2
        if clamp is not None:
            gate, value = z[:, :half], z[:, half:]
            gate = torch.where(gate > clamp.limit, clamp.limit, gate)
            value = torch.where(value.abs() > clamp.limit, clamp.limit * value.sign(), value)
            a = (1 + value) * gate / (1 + torch.exp(-clamp.alpha * gate))
        elif bank.config.activation.endswith("glu"):
            a = POINTWISE[bank.config.activation](z[:, :half]) * z[:, half:]
        else:
            a = POINTWISE[bank.config.activation](z)
        outputs.append(torch.einsum("th,dh->td", a, down) + down_bias)
    return outputs


def _factorised_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    scales = zip(bank.up_scale, bank.down_scale, strict=True)
    up = [(bank.up_out @ torch.diag(u) @ bank.up_in, bank.down_out @ torch.diag(d) @ bank.down_in) for u, d in scales]
    return [mlp(x_TD, up_HD, down_DH, bank.config.activation) for up_HD, down_DH in up]


def _low_rank_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    stacks = zip(bank.gate_in, bank.gate_out, bank.up_proj, bank.down_proj, strict=True)
    activation = bank.config.activation
    return [mlp(x_TD, torch.cat([b @ a, up]), down, activation) for a, b, up, down in stacks]


def _nested_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    def slices(width: int) -> tuple[Tensor, Tensor]:
        return torch.cat([rows[:width] for rows in bank.gate_up_proj]), bank.down_proj[:, :width]

    return [mlp(x_TD, *slices(width), bank.config.activation) for width in bank.config.widths]


def _neuron_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    pairs = zip(bank.gate_up_proj, bank.down_proj, strict=True)
    return [mlp(x_TD, up_KD, down_D[:, None], bank.config.activation) for up_KD, down_D in pairs]


def _constant_bank(bank: Any, x_TD: Tensor) -> list[Tensor]:
    outputs = []
    for value, mix in zip(bank.value, bank.mix, strict=True):
        a, b = torch.exp(x_TD @ mix.T).split(1, dim=1)
        outputs.append((a * x_TD + b * value) / (a + b))
    return outputs


BANKS: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "mlp": _mlp_bank,
    "factorised": _factorised_bank,
    "low_rank": _low_rank_bank,
    "nested": _nested_bank,
    "neurons": _neuron_bank,
    "values": lambda bank, x_TD: [
        (value if bank.project is None else table @ value).expand_as(x_TD)
        for table in ([None] if bank.project is None else bank.project)
        for value in bank.value
    ],
    "zero": lambda bank, x_TD: [torch.zeros_like(x_TD)] * bank.config.num_experts,
    "copy": lambda bank, x_TD: [x_TD] * bank.config.num_experts,
    "constant": _constant_bank,
}

MIXES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "interpolated": lambda logits, routed, shared: (routed * torch.exp(logits) + shared) / (torch.exp(logits) + 1),
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
    up, down = shared.mlp.gate_up_proj, shared.mlp.down_proj
    if shared.config.bias:  # a column of ones carries the biases
        rows_TF = torch.cat((x_TD, torch.ones(len(x_TD), 1)), 1)
        wide = torch.cat((up.weight, up.bias[:, None]), 1)
        shared_TD = mlp(rows_TF, wide, down.weight, shared.config.activation) + down.bias
    else:
        shared_TD = mlp(x_TD, up.weight, down.weight, shared.config.activation)
    logits = None if gate is None else x_TD @ gate.weight.T + (0 if gate.bias is None else gate.bias)
    return MIXES[shared.config.mix.type](logits, y_TD, shared_TD)


def with_auxiliary(moe: MoE, x_D: Tensor) -> Tensor:
    """[D] -> [D]: of one token's experts, ``main`` read its row times the mean of the others' vectors."""
    router, select = moe.config.router, moe.config.router.select
    scores_TE = SCORES[router.score.type](router.score, (moe.router.gate.weight @ x_D)[None])
    chosen, weights_E = choices(select, scores_TE)[0], combine_weights(moe, x_D[None])[0]
    main, others = chosen[: select.main], chosen[select.main :]
    total = sum(weights_E[e] for e in others)
    vector_D = torch.ones_like(x_D)
    if total > 0:
        vector_D = sum(weights_E[e] / total * (1 + moe.router.auxiliary[e]) for e in others)
    outputs = [out[0] for bank in moe.banks for out in BANKS[bank.config.type](bank, (x_D * vector_D)[None])]
    return sum(weights_E[e] * outputs[e] for e in main)


def layer(moe: MoE, x_TD: Tensor) -> Tensor:
    """[T, D] -> [T, D]: what ``moe(x)[0]`` must be."""
    if moe.config.router.select.type == "auxiliary":
        return torch.stack([with_auxiliary(moe, x_D) for x_D in x_TD])
    return mix_experts(moe, x_TD, combine_weights(moe, x_TD))


def cut(moe: MoE, x_TD: Tensor) -> Tensor:
    """[T, D] -> [T, D] of a layer with heads: token by token, head by head, each a row of its own."""
    outputs = []
    for x_D in x_TD:
        projected, width = moe.split_proj @ x_D, len(x_D) // moe.config.heads
        rows = [projected[h * width : (h + 1) * width] for h in range(moe.config.heads)]
        parts = [layer(moe, row[None])[0] for row in rows]
        outputs.append(moe.merge_proj @ torch.cat(parts))
    return torch.stack(outputs)
