"""Self-contrast: a model's choice against its own weaker one, of a single lesser expert (arXiv:2405.14507)."""

import copy
import math

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config, Count
from moeforge.errors import UserError
from moeforge.models import Decoder
from moeforge.moe import Router
from moeforge.moe.select import TopK


class Contrast(Config):
    """Every token is read twice: as usual, and with one expert in each layer."""

    beta: float = Field(0.5, ge=0, le=100)
    """Logits become (1 + beta) strong - beta weak; 0 leaves them."""
    alpha: float = Field(0.1, ge=0, le=1)
    """Only tokens with at least this share of the likeliest one's probability may be written."""
    rank: Count = Field(2, ge=1)
    """The weak pass takes the expert of this rank; 1 is the best."""


def contrasted(strong_V: Tensor, weak_V: Tensor, contrast: Contrast) -> Tensor:
    """[V] float32 logits -> (1 + beta) strong - beta weak where a token is plausible, else -inf (equations 3 to 5)."""
    mixed_V = (1 + contrast.beta) * strong_V - contrast.beta * weak_V
    least = strong_V.max() + math.log(contrast.alpha) if contrast.alpha else -torch.inf
    return mixed_V.masked_fill(strong_V < least, -torch.inf)


def check_contrast(model: Decoder, contrast: Contrast) -> None:
    """Raises UserError where the model's routers have no expert of that rank."""
    if not model.moe_layers:
        raise UserError("contrast: this model has no experts to hold against each other")
    for layer, moe in model.moe_layers.items():
        try:
            _of_rank(moe.router, contrast.rank).check(moe.router.num_experts)
        except ValueError as error:
            raise UserError(f"contrast: layer {layer} has no expert of rank {contrast.rank}: {error}") from error


def _of_rank(router: Router, rank: int) -> TopK:
    select = router.config.select
    if not isinstance(select, TopK):
        raise UserError(f"contrast: ranks are of routers that take the k best, and one of these is '{select.type}'")
    return select.model_copy(update={"k": 1, "skip": rank - 1})


def weaker(model: Decoder, rank: int) -> Decoder:
    """The same weights, not copied, under routers that take the expert of ``rank`` alone."""
    routing = {id(module) for module in model.modules() if any(isinstance(m, Router) for m in module.modules())}
    kept = [module for module in model.modules() if id(module) not in routing]
    shared = [*kept, *model.parameters(), *model.buffers()]
    weak = copy.deepcopy(model, {id(one): one for one in shared})
    for moe in weak.moe_layers.values():
        router = moe.router
        router.config = router.config.model_copy(update={"select": _of_rank(router, rank)})
    return weak
