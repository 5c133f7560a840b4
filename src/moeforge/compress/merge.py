"""Experts merged for good: which go together, and the one that a group of them becomes (MC-SMoE, arXiv:2310.01334)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.compress.plan import Row
from moeforge.compress.profile import Profile
from moeforge.errors import UserError
from moeforge.models import ModelConfig


def join(profile: Profile, rows: Sequence[Row], share: float, config: ModelConfig) -> list[Row]:
    """``rows`` with the ``share`` of each bank's experts that is used least merged into the others.

    Raises UserError where no expert would be.
    """
    into: dict[tuple[int, int], int] = {}
    for layer, seen in profile.layers.items():
        moe = config.all_layers[layer].moe
        for span in moe.spans if moe else ():
            own = [row.expert for row in rows if row.layer == layer and row.expert in span]
            keep = len(own) - round(share * len(own))
            if 0 < keep < len(own):
                if not seen.correlation.any():
                    raise UserError(f"layer {layer}: its router tells no logits, by which experts to merge are found")
                found = groups(seen.count[own], seen.correlation[own][:, own], keep)
                into |= {(layer, own[at]): own[to] for at, to in enumerate(found) if at != to}
    if not into:
        raise UserError(f"a share of {share:.3g} merges no expert of any layer")
    return [row.replace(action="merge_into", into=into[row.place]) if row.place in into else row for row in rows]


def groups(use_E: Tensor, likeness_EE: Tensor, keep: int) -> list[int]:
    """Of each expert the one that it is merged into, itself for the ``keep`` most used: the others go to the one of
    these that they are most alike, as the correlation of router logits has it.

    ``keep`` = 1 is all experts to one (arXiv:2310.09832). Raises UserError for a number that makes no sense.
    """
    if not 1 <= keep < len(use_E):
        raise UserError(f"merging {len(use_E)} experts leaves 1 to {len(use_E) - 1} of them, not {keep}")
    dominant = use_E.argsort(descending=True, stable=True)[:keep].sort().values
    into = dominant[likeness_EE[:, dominant].argmax(1)]
    into[dominant] = dominant  # whatever they are like
    return into.tolist()


def merge(up_NWD: Tensor, down_NDH: Tensor, use: Sequence[float], align: bool = True) -> tuple[Tensor, Tensor]:
    """One expert [W, D], [D, H] of n, by the mean with weights ``use``; experts that nothing used count alike.

    ``align``: the hidden units of each are first put in the order in which they are most like the first expert's. A
    unit is its row of up, with a gate both rows, and its column of down. Works in float32, returns the weights' type.
    """
    count, _, d_expert = down_NDH.shape
    gates = up_NWD.shape[1] // d_expert
    up, down = up_NWD.float().unflatten(1, (gates, d_expert)), down_NDH.float()
    if align:
        units = torch.cat([up.transpose(1, 2).flatten(2), down.transpose(1, 2)], -1)  # [n, H, values of a unit]
        orders = [alike(units[0], other) for other in units]
        up = torch.stack([own[:, order] for own, order in zip(up, orders, strict=True)])
        down = torch.stack([own[:, order] for own, order in zip(down, orders, strict=True)])
    weight = torch.tensor(use, dtype=torch.float32)
    weight = weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / count)
    merged_up = torch.einsum("n,nghd->ghd", weight, up).flatten(0, 1)
    return merged_up.to(up_NWD.dtype), torch.einsum("n,ndh->dh", weight, down).to(down_NDH.dtype)


def alike(first_HV: Tensor, other_HV: Tensor) -> Tensor:
    """The order [H] of the other's rows in which the sum of inner products with the first one's is largest."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UserError("aligning experts needs scipy: pip install 'moeforge[compress]'") from error
    _, order = linear_sum_assignment((first_HV @ other_HV.T).numpy(), maximize=True)
    return torch.from_numpy(order)
