"""Rows of routers that score by sigmoid or in groups, and of shared experts."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.rows import Joint, Settings, Tree

Theirs = Mapping[str, Any]


def groups(count: int | None, best: int | None) -> Joint:
    """``topk_group`` of ``n_group`` groups of experts; all of them is no limit."""

    def read(theirs: Theirs) -> Tree:
        num, top = theirs["n_group"] or 1, theirs["topk_group"] or 1
        return {} if num == top else {"moe.router.select.num_groups": num, "moe.router.select.top_groups": top}

    def write(ours: Settings) -> Tree:
        return {"n_group": ours["moe.router.select.num_groups"], "topk_group": ours["moe.router.select.top_groups"]}

    return Joint({"n_group": count, "topk_group": best}, read, write)


def shared(name: str, default: int) -> Joint:
    """So many shared experts, or none."""

    def read(theirs: Theirs) -> Tree:
        return {"moe.shared.num_shared_experts": theirs[name]} if theirs[name] else {"moe.shared": None}

    def write(ours: Settings) -> Tree:
        return {name: ours.get("moe.shared.num_shared_experts", 0)}

    return Joint({name: default}, read, write)
