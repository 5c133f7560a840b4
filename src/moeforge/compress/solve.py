"""Plans from a budget: which format each expert gets, as an integer program."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from moeforge.compress.plan import Row
from moeforge.compress.profile import FORMATS, Profile
from moeforge.errors import UserError
from moeforge.hub.store import Format

Granularity = Literal["expert", "layer", "model"]
WHOLE = Format(16, None)
CODEBOOK, NEIGHBOUR, LESS = Format("vector", 128), Format(2, 128), 0.8
"""What vectors of a codebook are expected to lose, as a share of two bits for each weight: a profile does not round to
them, since fitting takes seconds for a large expert. Gaussian weights lose 0.83, heavier tails less (docs/compress.md).
"""
ALL = (*FORMATS, CODEBOOK, WHOLE)


@dataclass(frozen=True)
class Objective:
    """What is summed over experts: tokens^frequency * (mean combine weight)^weight * (squared output error)^error.

    As MC-MoE has it (arXiv:2410.06270, equation 5). These exponents give the expected squared error of the layer's
    output, which is divided by what the residual stream holds there.
    """

    frequency: float = 1.0
    weight: float = 2.0
    error: float = 1.0

    def losses(self, profile: Profile, layer: int) -> Tensor:
        """[E, ``ALL``]."""
        seen = profile.layers[layer]
        mean = seen.weight / seen.count.clamp_min(1)
        factor = (seen.count / profile.about["tokens"]) ** self.frequency * mean**self.weight
        fewer = seen.error[:, [FORMATS.index(NEIGHBOUR)]] * LESS
        errors = torch.cat([seen.error, fewer, torch.zeros_like(fewer)], 1) ** self.error
        return factor[:, None] * errors / seen.energy


Choice = tuple[int, int]
"""(layer, expert)."""


def solve(
    profile: Profile,
    rows: Sequence[Row],
    budget: int,
    bytes_of: Callable[[int, int, Format], int],
    granularity: Granularity = "expert",
    objective: Objective | None = None,
    formats: Iterable[Format] = (*FORMATS, WHOLE),
) -> list[Row]:
    """``rows`` with the formats of the kept ones chosen so that their records fit into ``budget`` bytes.

    ``bytes_of(layer, expert, format)`` are a record's. Raises UserError, with the smallest size, where nothing fits.
    """
    objective, among = objective or Objective(), [format for format in ALL if format in {*formats}]
    columns = [ALL.index(format) for format in among]
    kept = [row for row in rows if row.action == "keep"]
    losses = {layer: objective.losses(profile, layer)[:, columns] for layer in profile.layers}
    units: dict[object, list[Row]] = {}
    for row in kept:
        key = {"expert": row.place, "layer": row.layer, "model": 0}[granularity]
        units.setdefault(key, []).append(row)
    groups = list(units.values())
    cost = [[sum(bytes_of(*row.place, f) for row in group) for f in among] for group in groups]
    loss = [[float(sum(losses[r.layer][r.expert, f] for r in group)) for f in range(len(among))] for group in groups]
    chosen = choose(loss, cost, budget)
    change = {r.place: among[c] for group, c in zip(groups, chosen, strict=True) for r in group}
    return [
        row.replace(bits=change[row.place].bits, group=change[row.place].group) if row.action == "keep" else row
        for row in rows
    ]


def choose(loss: Sequence[Sequence[float]], cost: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One choice for each unit, of least total loss among those that cost ``budget`` at most.

    Raises UserError, with the smallest cost, where there is none.
    """
    smallest = sum(min(unit) for unit in cost)
    if smallest > budget:
        raise UserError(
            f"the smallest plan needs {smallest:,} bytes for experts, and {max(budget, 0):,} are left for them"
        )
    if find_spec("scipy") is None:
        raise UserError("a plan is solved for with scipy, which is not installed: pip install 'moeforge[compress]'")
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    units, options = len(loss), len(loss[0])
    flat = np.asarray(loss, dtype=float).ravel()
    flat = flat / max(flat.max(), 1e-300)
    spent = np.asarray(cost, dtype=float).ravel() / max(budget, 1)
    variable = np.arange(units * options)
    once = csr_array((np.ones(units * options), (variable // options, variable)), shape=(units, units * options))
    rules = [LinearConstraint(once, 1, 1), LinearConstraint(csr_array(spent[None]), 0, 1)]
    limits = {"time_limit": 20.0, "mip_rel_gap": 1e-4}
    found = milp(flat, constraints=rules, integrality=np.ones_like(flat), bounds=Bounds(0, 1), options=limits)
    if found.x is None:
        raise UserError(f"no plan was found: {found.message}")
    return [int(at) for at in found.x.reshape(units, options).argmax(1)]
