"""Which experts every token of a text takes, in one forward pass."""

from typing import NamedTuple

import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.models import Decoder, Output
from moeforge.models.domain import known
from moeforge.moe import MergedRoute, SoftRoute


class Choice(NamedTuple):
    """What one token got in one layer."""

    experts: list[int]
    """Heaviest first; empty when no expert took the token."""
    weights: list[float]
    """Combine weights, in the same order."""


class Traced(NamedTuple):
    """One token of a text."""

    piece: str
    """As ``Tokenizer.pieces`` shows it."""
    choices: dict[int, Choice]
    """By number of the layer: the routing at this token's own position, where it is the input."""


def refuse_blocks(model: Decoder) -> None:
    """Raises UserError for a model that can only read whole blocks of tokens."""
    if any(layer.mixes_tokens for layer in model.config.all_layers):
        raise UserError("a layer of this model mixes whole blocks of tokens (token_block): no token can stand alone")


@torch.no_grad()
def trace(model: Decoder, tokenizer: Tokenizer, text: str, domain: str | None = None) -> list[Traced]:
    """Every token of ``text`` with its own experts. What a document starts with is run, but not listed.

    Raises UserError when the text is longer than the model's context, and as ``known`` does for its ``domain``.
    """
    refuse_blocks(model)
    start, ids = tokenizer.start_ids, tokenizer.encode(text)
    room = model.config.max_seq_len - len(start)
    if len(ids) > room:
        raise UserError(
            f"the text has {len(ids)} tokens, the model's context takes {room} (max_seq_len - {len(start)})"
        )
    input_ids = torch.tensor([[*start, *ids]], device=model.embedding.weight.device)
    output = model(input_ids, known=known(model, domain, input_ids))
    mixing = [layer for layer, routing in output.routings.items() if isinstance(routing.route, SoftRoute)]
    if mixing:
        raise UserError(f"layer {mixing[0]} mixes all tokens into every expert: no token has experts of its own")
    by_token = choices(output)[len(start) :]
    return [Traced(piece, chosen) for piece, chosen in zip(tokenizer.pieces(ids), by_token, strict=True)]


def choices(output: Output, count: int | None = None) -> list[dict[int, Choice]]:
    """Of each row of a forward pass, what every layer's router decided: ``count`` rows, where not all have logits.

    A layer that mixes all tokens into every expert says nothing.
    """
    count = output.logits.shape[0] * output.logits.shape[1] if count is None else count
    rows: list[dict[int, Choice]] = [{} for _ in range(count)]
    for layer, routing in output.routings.items():
        route = routing.route.edges if isinstance(routing.route, MergedRoute) else routing.route
        if isinstance(route, SoftRoute):
            continue
        found: list[list[tuple[float, int]]] = [[] for _ in range(count)]
        token_N = route.token // (route.num_tokens // count)  # a token may be cut into several rows
        edges = zip(token_N.tolist(), route.weight.tolist(), route.expert.tolist(), strict=True)
        for token, weight, expert in edges:
            found[token].append((weight, expert))
        for row, pairs in zip(rows, found, strict=True):
            pairs.sort(key=lambda pair: (-pair[0], pair[1]))
            row[layer] = Choice([expert for _, expert in pairs], [weight for weight, _ in pairs])
    return rows
