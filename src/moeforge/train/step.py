"""One optimizer step over its micro-batches: losses scaled once, by the tokens of the whole step."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.evaluate import summed_loss
from moeforge.models import Decoder, Output
from moeforge.moe import Router
from moeforge.parallel.ranks import ALONE, Ranks
from moeforge.train.diagnose import first_broken_gradient, first_broken_module
from moeforge.train.distill import Teacher


@dataclass
class StepResult:
    """What one step measured."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """``lm`` in nats per token, with a teacher ``distill``, and each balance loss (mean over routers); unweighted."""
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)
    """By router, as ``Decoder.routers`` names them, [E]."""
    dropped: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By router, choices that a capacity left out; empty where no router has one."""
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By router, what went through it."""
    grad_norm: float = 0.0
    """Before clipping."""


def accumulate_gradients(
    model: Decoder,
    batches: list[Batch],
    dtype: torch.dtype,
    step: int,
    ranks: Ranks = ALONE,
    teacher: Teacher | None = None,
) -> StepResult:
    """Adds the gradient of the whole step's loss; the same whether the step is one micro-batch or many.

    ``teacher`` adds its part of the loss. Of several processes each takes rows of its own from every batch; the result
    is what it measured there.
    Raises UserError naming the layer when the loss is not finite.
    """
    result = StepResult()
    targets = sum(batch.num_targets for batch in batches)
    batches = [ranks.own(batch) for batch in batches]
    counts, routers = _counts_of_step(model, batches, dtype, step, ranks), model.routers
    for batch in batches:
        share = batch.num_targets / targets
        output = _run(model, batch, dtype, step)
        loss = summed_loss(output, batch.labels) / targets
        result.losses["lm"] += loss.item()
        if teacher is not None:
            with _autocast(output.logits.device, dtype):
                divergence = teacher.loss(output.logits, batch) / targets
            result.losses["distill"] += divergence.item()
            loss = loss + teacher.config.weight * divergence
        routings = output.by_name
        if len(batches) == 1 and ranks.size > 1:
            counts = _over_ranks({where: routers[where].counts(routing) for where, routing in routings.items()}, ranks)
        for where, routing in routings.items():
            router = routers[where]
            values = router.balance_losses(routing, len(batch.input_ids), counts.get(where)) if share else {}
            for name, weight in router.loss_weights.items():
                value = values.get(name, loss.new_zeros(()))
                loss = loss + share * weight * value
                result.losses[name.removesuffix("_loss")] += share * value.item() / len(routings)
            if router.config.capacity:
                result.dropped[where] += routing.dropped
            result.rows[where] += routing.route.num_tokens
            result.tokens_per_expert[where] = result.tokens_per_expert.get(where, 0) + routing.choices
        if ranks.any(not torch.isfinite(loss)):
            raise UserError(f"step {step + 1}: {_broken(model, batch, dtype, step, loss.item(), ranks)}")
        loss.backward()
    return result


def apply_gradients(
    model: Decoder, optimizer: torch.optim.Optimizer, result: StepResult, clip: float, step: int, ranks: Ranks = ALONE
) -> None:
    """Clips, updates the weights, then moves every router's bias once. Raises UserError on a non-finite gradient.

    Of several processes, the gradients and ``result`` are summed over them on the way.
    """
    norm = ranks.clip(model, clip)
    result.grad_norm = norm.item()
    if not torch.isfinite(norm):
        found = ranks.gather(first_broken_gradient(model))
        where = next((name for name in found if name), "none: the norm itself overflowed")
        raise UserError(f"step {step + 1}: the gradient norm is {result.grad_norm}; first non-finite: {where}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ranks.size > 1:
        _add_up(result, ranks)
    passes: dict[Router, list[str]] = defaultdict(list)
    for name, router in model.routers.items():
        passes[router].append(name)
    for router, names in passes.items():  # a layer that is passed several times has as many loads, and moves once
        loads = [result.tokens_per_expert[name] for name in names]
        router.step(torch.stack(loads).sum(0), sum(result.rows[name] for name in names))


def _add_up(result: StepResult, ranks: Ranks) -> None:
    """What each process measured becomes what all did. Losses are shares of the step's already, so they add up too."""
    loads = result.tokens_per_expert
    tables: list[dict[str, Any]] = [result.losses, result.dropped, result.rows]
    device = next(iter(loads.values())).device if loads else None
    singles = torch.tensor([value for table in tables for value in table.values()], dtype=torch.float64, device=device)
    summed = ranks.total(torch.cat([singles, *(load_E.double() for load_E in loads.values())]))
    numbers = iter(summed.tolist())
    for table in tables:
        table.update({name: type(value)(next(numbers)) for name, value in table.items()})
    parts = summed[len(singles) :].long().split([len(load_E) for load_E in loads.values()])
    loads.update(zip(loads, parts, strict=True))


def _run(model: Decoder, batch: Batch, dtype: torch.dtype, step: int) -> Output:
    with _autocast(batch.input_ids.device, dtype):
        return model(batch.input_ids, position=batch.position, document=batch.document, step=step, known=batch.known)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _broken(model: Decoder, batch: Batch, dtype: torch.dtype, step: int, loss: float, ranks: Ranks) -> str:
    """What is wrong with the loss, of the first process where it is not finite."""
    module = first_broken_module(model, lambda: _run(model, batch, dtype, step))
    loss, module = next(found for found in ranks.gather((loss, module)) if not math.isfinite(found[0]))
    return f"the loss is {loss}; first non-finite output: {module}"


def _counts_of_step(
    model: Decoder, batches: list[Batch], dtype: torch.dtype, step: int, ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Choices per expert over all micro-batches, for losses that need them before the first backward pass.

    Their gradient cannot be put together from micro-batches otherwise; it costs one more forward pass, and only where
    a step has several micro-batches and a loss is ``over: batch``.
    """
    routers = model.routers
    wanting = any(getattr(loss, "over", "") == "batch" for router in routers.values() for loss in router.config.losses)
    if len(batches) == 1 or not wanting:
        return {}
    total: dict[str, dict[str, Tensor]] = defaultdict(dict)
    # The same random numbers come again in the passes that count: a noisy router must choose as it did here.
    with torch.random.fork_rng(), torch.no_grad():
        for batch in batches:
            for where, routing in _run(model, batch, dtype, step).by_name.items():
                for name, counts in routers[where].counts(routing).items():
                    total[where][name] = total[where].get(name, 0) + counts
    return _over_ranks(total, ranks)


def _over_ranks(counts: dict[str, dict[str, Tensor]], ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """The counts of all processes together."""
    leaves = [(where, name, count_E) for where, named in counts.items() for name, count_E in named.items()]
    if ranks.size == 1 or not leaves:
        return counts
    summed = ranks.total(torch.cat([count_E for *_, count_E in leaves])).split([len(count_E) for *_, count_E in leaves])
    total: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (where, name, _), count_E in zip(leaves, summed, strict=True):
        total[where][name] = count_E
    return total
