"""What claims are about besides bits per byte and loads: measured on a trained model's validation text."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.data.packing import IGNORED, Batch, Packed, evaluation_batches
from moeforge.data.prepare import TextData
from moeforge.errors import UserError
from moeforge.evaluate import bits_per_byte
from moeforge.models import Decoder
from moeforge.moe import Context, Route, Router, Routing
from moeforge.train import RunConfig

TOKENS = 40_000
"""Of validation text, spread over it."""
NOISE = 0.1
"""Deviation of what ``flips`` adds to a router's rows, in units of their root mean square."""
NODES = 2
"""Groups of experts, in order; sequence i of a batch belongs to node i mod ``NODES``, as in ``locality_loss``."""

Look = Callable[[Router, Tensor, Context, Routing], Tensor]
Quantity = Callable[[Decoder, TextData, RunConfig], float]


def chosen(route: Any) -> Tensor:
    """[T, E] bool: which experts a token has. Raises UserError where none has any of its own."""
    if not isinstance(route, Route):
        raise UserError("recipe.against.by: select: soft and merged choose no experts: take by=bits_per_byte")
    mask_TE = torch.zeros(route.num_tokens, route.num_experts, dtype=torch.bool, device=route.token.device)
    mask_TE[route.token, route.expert] = True
    return mask_TE


def agrees(router: Router, x_TD: Tensor, context: Context, routing: Routing) -> Tensor:
    """[T, E] bool: choices that are among as many experts whose outputs are longest (arXiv:2402.02526)."""
    assert context.banks is not None
    norm_TE = torch.cat([bank.everywhere(x_TD) for bank in context.banks]).float().norm(dim=-1).T
    rank_TE = norm_TE.argsort(1, descending=True).argsort(1)
    chosen_TE = chosen(routing.route)
    return chosen_TE & (rank_TE < chosen_TE.sum(1, keepdim=True))


def flipped(router: Router, x_TD: Tensor, context: Context, routing: Routing) -> Tensor:
    """[T, E] bool: choices that a little noise on the rows undoes."""
    noise_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(0)).to(x_TD)
    noisy_TD = x_TD + NOISE * x_TD.square().mean(1, keepdim=True).sqrt() * noise_TD
    return chosen(routing.route) & ~chosen(router.forward(noisy_TD, context).route)


def local(router: Router, x_TD: Tensor, context: Context, routing: Routing) -> Tensor:
    """[T, E] bool: choices that stay on the node of the token's sequence."""
    chosen_TE = chosen(routing.route)
    num_tokens, num_experts = chosen_TE.shape
    sequence_T = torch.arange(num_tokens, device=x_TD.device) // (num_tokens // context.batch_size)
    node_E = torch.arange(num_experts, device=x_TD.device) * NODES // num_experts
    return chosen_TE & (sequence_T[:, None] % NODES == node_E)


@torch.no_grad()
def share_of_choices(look: Look, model: Decoder, batches: Iterable[Batch]) -> float:
    """Of all choices of experts in all layers, the share that ``look`` finds."""
    found, total = 0, 0

    def count(router: Any, arguments: tuple[Tensor, Context], routing: Routing) -> None:
        nonlocal found, total
        found += int(look(router, *arguments, routing).sum())
        total += int(chosen(routing.route).sum())

    hooks = [moe.router.register_forward_hook(count) for moe in {*model.moe_layers.values()}]
    try:
        for batch in batches:
            model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
    finally:
        for hook in hooks:
            hook.remove()
    return found / max(1, total)


def _share(look: Look) -> Quantity:
    return lambda model, data, config: share_of_choices(look, model, _some(data.validation, config))


def generalisation_gap(model: Decoder, data: TextData, config: RunConfig) -> float:
    """Bits per byte of validation text beyond those of as much training text."""
    held_out, seen = (bits_per_byte(model, _some(text, config)) for text in (data.validation, data.train))
    return held_out.bits_per_byte - seen.bits_per_byte


@torch.no_grad()
def worst_domain_loss(model: Decoder, data: TextData, config: RunConfig) -> float:
    """Nats per token of the domain that is worst."""
    nats, count = torch.zeros(len(data.domains)), torch.zeros(len(data.domains))
    for batch in evaluation_batches(data.validation, config.batch_size, config.seq_len):
        output = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
        nats_T = F.cross_entropy(output.logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="none")
        real_T, domain_T = (batch.labels != IGNORED).flatten(), batch.domain.flatten()
        nats.index_add_(0, domain_T[real_T], nats_T[real_T])
        count += torch.bincount(domain_T[real_T], minlength=len(count))
    return float((nats / count)[count > 0].max())


def _some(text: Packed, config: RunConfig) -> Iterable[Batch]:
    return evaluation_batches(text, config.batch_size, config.seq_len, TOKENS)


QUANTITIES: dict[str, Quantity] = {
    "agreement": _share(agrees),
    "flips": _share(flipped),
    "local_share": _share(local),
    "generalisation_gap": generalisation_gap,
    "worst_domain_loss": worst_domain_loss,
}
"""By the name that ``recipe.against.by`` has."""
