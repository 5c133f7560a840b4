"""The row of rotary positions: ``rope_parameters`` of transformers 5, or the fields that configs had before it."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.rows import Joint, Settings, Tree

KINDS = {"linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "by_wavelength", "longrope": "longrope"}
"""Theirs -> our types of ``rope``; ``default`` is none of them."""
LENGTH = "original_max_position_embeddings"


def rotary(theta: float, fraction: float = 1.0, silent: Tree | None = None, short_only: bool = False) -> Joint:
    """``theta`` and ``fraction`` (how much of a head rotates) stand where nothing else is said, ``silent`` where there
    is nothing at all. With ``short_only``, longrope's ``long_factor`` is never used."""
    defaults = dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", LENGTH))

    def read(theirs: Mapping[str, Any]) -> Tree:
        rope = dict(theirs["rope_scaling"] or theirs["rope_parameters"] or silent or {})
        old = rope.pop("type", "default")
        kind = rope.pop("rope_type", old)
        base = rope.pop("rope_theta", theirs["rope_theta"])
        part = rope.pop("partial_rotary_factor", theirs["partial_rotary_factor"])
        settings = {"rope_theta": theta if base is None else base, "rope_fraction": fraction if part is None else part}
        if kind == "default" and not rope:
            return settings
        if kind not in KINDS:
            raise ValueError(f"rope_type is {kind!r} with {rope}; what the decoder has is default, {', '.join(KINDS)}")
        if kind in ("yarn", "llama3", "longrope"):
            length = theirs[LENGTH] or rope.pop(LENGTH, None) or theirs["max_position_embeddings"]
            rope = {name: value for name, value in rope.items() if name != LENGTH} | {"original_max_seq_len": length}
        if kind == "longrope" and short_only:
            rope["long_factor"] = rope.get("short_factor")
        return settings | {"rope": {"type": KINDS[kind], **rope}}

    def write(ours: Settings) -> Tree:
        rope = {name: value for name, value in (ours.get("rope") or {}).items() if value is not None}
        (kind,) = [theirs for theirs, here in KINDS.items() if here == rope["type"]] if rope else ["default"]
        named = {LENGTH if name == "original_max_seq_len" else name: rope[name] for name in rope if name != "type"}
        part = {} if ours["rope_fraction"] == fraction == 1.0 else {"partial_rotary_factor": ours["rope_fraction"]}
        return {"rope_parameters": {"rope_type": kind, "rope_theta": ours["rope_theta"], **part, **named}}

    return Joint(defaults, read, write)
