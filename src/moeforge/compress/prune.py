"""Which experts to drop: orders in which a layer's experts can be missed."""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb

from torch import Tensor

from moeforge.compress.plan import Row
from moeforge.compress.profile import Profile, Seen
from moeforge.errors import UserError

WORTH: dict[str, Callable[[Seen], Tensor]] = {
    "frequency": lambda seen: seen.count,
    "weight": lambda seen: seen.weight,
    "reap": lambda seen: seen.reap,
    "router_norm": lambda seen: seen.router_norm,
}
"""What an expert is worth: tokens (arXiv:2206.00277 drops by what it is used for), summed combine weight, weight times
output (REAP, arXiv:2510.13999), and the length of its router's row, which grows from nothing as training needs the
expert (arXiv:2405.16646 asks for its change while fine-tuning)."""
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


def drop(profile: Profile, rows: Sequence[Row], share: float, order: str) -> list[Row]:
    """``rows`` with the ``share`` of each layer's experts that is worth least dropped.

    Raises UserError for an unknown order, and where no expert would be dropped.
    """
    if order not in ORDERS:
        raise UserError(f"experts are ordered by one of {', '.join(ORDERS)}, not by {order}")
    gone: set[tuple[int, int]] = set()
    for layer, seen in profile.layers.items():
        own = [row.expert for row in rows if row.layer == layer]
        gone |= {(layer, expert) for expert in ORDERS[order](seen, own, round(share * len(own)))}
    if not gone:
        raise UserError(f"a share of {share:.3g} drops no expert of any layer")
    return [row.replace(action="drop") if row.place in gone else row for row in rows]
