"""Which experts to drop: orders in which a layer's experts can be missed."""

from collections.abc import Callable, Sequence

from torch import Tensor

from moeforge.compress.plan import Row
from moeforge.compress.profile import Profile, Seen
from moeforge.errors import UserError

ORDERS: dict[str, Callable[[Seen], Tensor]] = {
    "frequency": lambda seen: seen.count,
    "weight": lambda seen: seen.weight,
    "reap": lambda seen: seen.reap,
    "router_norm": lambda seen: seen.router_norm,
}
"""What an expert is worth: tokens (arXiv:2206.00277 drops by what it is used for), summed combine weight, weight times
output (REAP, arXiv:2510.13999), and the length of its router's row, which grows from nothing as training needs the
expert (arXiv:2405.16646 asks for its change while fine-tuning)."""


def drop(profile: Profile, rows: Sequence[Row], share: float, order: str) -> list[Row]:
    """``rows`` with the ``share`` of each layer's experts that is worth least dropped.

    Raises UserError for an unknown order, and where no expert would be dropped.
    """
    if order not in ORDERS:
        raise UserError(f"experts are ordered by one of {', '.join(ORDERS)}, not by {order}")
    gone: set[tuple[int, int]] = set()
    for layer, seen in profile.layers.items():
        own = [row.expert for row in rows if row.layer == layer]
        worth = ORDERS[order](seen)[own]
        count = round(share * len(own))
        gone |= {(layer, own[at]) for at in worth.argsort(stable=True)[:count].tolist()}
    if not gone:
        raise UserError(f"a share of {share:.3g} drops no expert of any layer")
    return [row.replace(action="drop") if row.place in gone else row for row in rows]
