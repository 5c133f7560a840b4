"""Which tokens each expert takes: counts over a text, by kind and by token."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeforge.analyze.kinds import KINDS
from moeforge.data.packing import IGNORED, Packed, evaluation_batches
from moeforge.models import Decoder
from moeforge.moe import Route


@dataclass(frozen=True)
class Usage:
    """What the E experts of one layer took: one count per token and expert it went to."""

    by_kind: Tensor
    """[E, kinds] int64."""
    by_token: Tensor
    """[E, V] int64."""

    @property
    def lift(self) -> Tensor:
        """[E, kinds] float64: a kind's share of an expert's tokens over its share of all. NaN where nothing came."""
        return lift(self.by_kind)

    def typical(self, count: int) -> list[list[int]]:
        """Per expert, the ``count`` tokens that tell its share from the average most, best first.

        Ranked by share x log lift, a token's part of the Kullback-Leibler divergence; those below average never show.
        """
        share_EV = self.by_token / self.by_token.sum(1, keepdim=True).clamp_min(1)
        scores_EV = torch.xlogy(share_EV, lift(self.by_token).nan_to_num(1.0))
        best = scores_EV.topk(min(count, scores_EV.shape[1]), dim=1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [[token for value, token in zip(*row, strict=True) if value > 0] for row in pairs]


def lift(counts_EX: Tensor) -> Tensor:
    """[E, X] counts -> float64 share within the row over share within all rows; NaN where either has nothing."""
    counts_EX = counts_EX.double()
    own_EX = counts_EX / counts_EX.sum(1, keepdim=True)
    return own_EX / (counts_EX.sum(0) / counts_EX.sum())


@torch.no_grad()
def tally(
    model: Decoder, packed: Packed, kinds_N: Tensor, seq_len: int, max_tokens: int | None = None, batch_size: int = 16
) -> dict[int, Usage]:
    """Usage of every MoE layer over ``packed`` (or ``max_tokens`` spread over it); ``kinds_N`` as ``kinds_of`` gives.

    Layers that mix tokens, into slots (soft routes) or by their experts, have no such counts and are left out.
    """
    usage: dict[int, Usage] = {}
    texts = evaluation_batches(packed, batch_size, seq_len, max_tokens)
    marks = evaluation_batches(replace(packed, ids=kinds_N), batch_size, seq_len, max_tokens)  # the same windows
    for text, mark in zip(texts, marks, strict=True):
        text, device = text.to(model.embedding.weight.device), model.embedding.weight.device
        counted_T = (text.labels != IGNORED).flatten()
        tokens_T, kinds_T = text.input_ids.flatten(), mark.input_ids.flatten().to(device)
        output = model(text.input_ids, position=text.position, document=text.document, known=text.known)
        for layer, routing in output.routings.items():
            if isinstance(routing.route, Route) and not model.config.applied_layers[layer].mixes_tokens:
                by_kind = _count(routing.route, kinds_T, counted_T, len(KINDS))
                by_token = _count(routing.route, tokens_T, counted_T, model.embedding.num_embeddings)
                before = usage.get(layer, Usage(torch.zeros_like(by_kind), torch.zeros_like(by_token)))
                usage[layer] = Usage(before.by_kind + by_kind, before.by_token + by_token)
    return usage


def _count(route: Route, values_T: Tensor, counted_T: Tensor, size: int) -> Tensor:
    """[E, size] int64 on the CPU: how often each value went to each expert, padding left out."""
    token_N = route.token // (route.num_tokens // len(values_T))  # a token may be cut into several rows
    kept = counted_T[token_N]
    key = route.expert[kept] * size + values_T[token_N[kept]]
    return torch.bincount(key, minlength=route.num_experts * size).view(route.num_experts, size).cpu()
