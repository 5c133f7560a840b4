"""Which experts to drop: orders in which a layer's experts can be missed; and which choices need not be run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb

from torch import Tensor

from moeforge.compress.plan import Row, Skip
from moeforge.compress.profile import Profile, Seen
from moeforge.compress.stream import Streamed
from moeforge.errors import UserError
from moeforge.models import ModelConfig

WORTH: dict[str, Callable[[Seen], Tensor]] = {
    "frequency": lambda seen: seen.count,
    "weight": lambda seen: seen.weight,
    "reap": lambda seen: seen.reap,
    "router_norm": lambda seen: seen.router_norm,
    "router_hint": lambda seen: seen.hint,
}
"""What an expert is worth: tokens and summed combine weight (both as arXiv:2206.00277, on a task's text), weight times
output (REAP, arXiv:2510.13999), the length of its router's row, which grows from nothing as training needs the expert,
or with ``since`` its growth in fine-tuning (arXiv:2405.16646), and its weights times what they read times combine
weights (MoE-Pruner, arXiv:2410.12013, whose scores of single weights are summed here)."""
TRIED = 20_000
"""Sets of experts up to which every one is tried."""


def least_error(seen: Seen, own: list[int], count: int) -> list[int]:
    """So many of ``own`` whose outputs, missing together, change the layer's least (after arXiv:2402.14800, which also
    tries every set, and lets the router choose again). All sets up to ``TRIED``, then the best one more each time."""
    joint = seen.joint.double().numpy()

    def error(gone: Sequence[int]) -> float:
        return joint[[[one] for one in gone], list(gone)].sum()

    if comb(len(own), count) <= TRIED:
        return list(min(combinations(own, count), key=error))
    gone: list[int] = []
    while len(gone) < count:
        gone.append(min((one for one in own if one not in gone), key=lambda one: error([*gone, one])))
    return gone


def least_worth(worth: Callable[[Seen], Tensor]) -> Callable[[Seen, list[int], int], list[int]]:
    """So many of the experts, those that are worth least, of equal ones the first."""
    return lambda seen, own, count: [own[at] for at in worth(seen)[own].argsort(stable=True)[:count].tolist()]


ORDERS = {name: least_worth(worth) for name, worth in WORTH.items()} | {"output_error": least_error}
"""(a layer, its experts, how many) -> those that go."""


def since(profile: Profile, base: Streamed) -> Profile:
    """``profile`` of a tuned model with ``router_norm`` as what it has grown by since ``base``, the model before.

    Raises UserError where the two do not have the same experts.
    """
    profile.check(base)
    grown = {}
    for layer, seen in profile.layers.items():
        gate = f"blocks.{layer}.moe.router.gate.weight"
        rows = base.outline.read(gate).get(gate)
        if rows is None or len(rows) != len(seen.count):
            raise UserError(f"{base.folder}: the router of layer {layer} has no row for each expert")
        grown[layer] = replace(seen, router_norm=seen.router_norm - rows.float().norm(dim=1))
    return Profile(grown, profile.about)


def skip(profile: Profile, share: float, config: ModelConfig) -> dict[int, Skip]:
    """By layer, the ratio under which the ``share`` of all choices after a token's first lies: half is the median of
    arXiv:2402.14800. Layers whose tokens have one choice are left out.

    Raises UserError where none is left, and for a share under the one percent that profiles tell apart.
    """
    if not round(100 * share):
        raise UserError(f"a share of {share:.3g} skips no choice: 0.01 is the least")
    found = {}
    for layer, seen in profile.layers.items():
        moe, ratio = config.all_layers[layer].moe, float(seen.ratio[round(100 * share)])
        if moe is not None and 0 < ratio <= 1:
            later = moe.router.select.mean_experts(moe.num_experts) - 1
            found[layer] = Skip(min_ratio=ratio, typical=1 + later * (1 - share))
    if not found:
        raise UserError("no token has a choice after its first that could be skipped")
    return found


def drop(
    profile: Profile, rows: Sequence[Row], share: float, order: str, groups: Mapping[int, int] | None = None
) -> list[Row]:
    """``rows`` with the ``share`` of each layer's experts that is worth least dropped; of each group of them, where
    ``groups`` has several for a layer.

    Raises UserError for an unknown order, for one that a layer's router says nothing of, and where no expert would be
    dropped.
    """
    if order not in ORDERS:
        raise UserError(f"experts are ordered by one of {', '.join(ORDERS)}, not by {order}")
    gone: set[tuple[int, int]] = set()
    for layer, seen in profile.layers.items():
        if order == "router_norm" and not seen.router_norm.any():
            raise UserError(f"layer {layer}: its router has no row for each expert, by whose length they are ordered")
        count = (groups or {}).get(layer, 1)
        for group in range(count):
            named = (row.expert for row in rows if row.layer == layer)
            own = [expert for expert in named if expert * count // len(seen.count) == group]
            gone |= {(layer, expert) for expert in ORDERS[order](seen, own, round(share * len(own)))}
    if not gone:
        raise UserError(f"a share of {share:.3g} drops no expert of any layer")
    return [row.replace(action="drop") if row.place in gone else row for row in rows]
