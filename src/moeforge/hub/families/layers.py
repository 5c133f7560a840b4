"""Rows that say which layers are what: experts or an MLP, a window or all that came before."""

from collections.abc import Callable, Mapping
from typing import Any

from moeforge.hub.families.rows import Joint, Settings, Tree

Theirs = Mapping[str, Any]


def _settings(sparse: list[bool]) -> Tree:
    """Ours for the layers that have experts."""
    if not any(sparse):
        return {"moe": None}
    first = sparse.index(True)
    gaps = {f"layers.{layer}.moe": None for layer in range(first, len(sparse)) if not sparse[layer]}
    return {"first_dense_layers": first, **gaps}


def dense_first(name: str, default: int) -> Joint:
    """``name`` layers without experts come first, all others have them."""

    def read(theirs: Theirs) -> Tree:
        return _settings([layer >= (theirs[name] or 0) for layer in range(theirs["num_hidden_layers"])])

    def write(ours: Settings) -> Tree:
        sparse = ours["sparse"]
        first = sparse.index(True) if True in sparse else len(sparse)
        if not all(sparse[first:]):
            raise ValueError(f"a layer without experts above one that has some; {name} only counts those below")
        return {name: first}

    return Joint({name: default}, read, write)


def every_step() -> Joint:
    """Every ``decoder_sparse_step``-th layer has experts, except ``mlp_only_layers``."""

    def read(theirs: Theirs) -> Tree:
        step, dense = theirs["decoder_sparse_step"], theirs["mlp_only_layers"] or ()
        layers = range(theirs["num_hidden_layers"])
        return _settings([layer not in dense and (layer + 1) % step == 0 for layer in layers])

    def write(ours: Settings) -> Tree:
        sparse = ours["sparse"]
        for step in range(1, len(sparse) + 1):
            if sparse == [(layer + 1) % step == 0 for layer in range(len(sparse))]:
                return {"decoder_sparse_step": step, "mlp_only_layers": []}
        return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n, has in enumerate(sparse) if not has]}

    return Joint({"decoder_sparse_step": 1, "mlp_only_layers": None}, read, write)


def from_start_to_end() -> Joint:
    """From one layer to another, every ``moe_layer_interval``-th layer has experts."""
    start, end, interval = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"

    def has(layer: int, first: int, last: int, step: int) -> bool:
        return first <= layer <= last and (layer + 1) % step == 0

    def read(theirs: Theirs) -> Tree:
        count = theirs["num_hidden_layers"]
        last = count - 1 if theirs[end] in (-1, None) else theirs[end]
        return _settings([has(layer, theirs[start], last, theirs[interval]) for layer in range(count)])

    def write(ours: Settings) -> Tree:
        sparse = ours["sparse"]
        held = [layer for layer, has_experts in enumerate(sparse) if has_experts] or [len(sparse)]
        for step in range(1, len(sparse) + 1):
            if sparse == [has(layer, held[0], held[-1], step) for layer in range(len(sparse))]:
                return {start: held[0], end: held[-1], interval: step}
        raise ValueError(f"{start}, {end} and {interval} cannot say which layers have experts: {held}")

    return Joint({start: 1, end: -1, interval: 1}, read, write)


def windows(pattern: Callable[[int, Theirs], bool], defaults: Tree) -> Joint:
    """``sliding_window`` in the layers that ``layer_types`` says, or ``pattern`` where it is silent."""

    def read(theirs: Theirs) -> Tree:
        count, types = theirs["num_hidden_layers"], theirs["layer_types"]
        if types is None:
            types = ["sliding_attention" if pattern(layer, theirs) else "full_attention" for layer in range(count)]
        strange = {*types} - {"sliding_attention", "full_attention"}
        if strange or len(types) != count:
            raise ValueError(f"layer_types names {sorted(strange) or len(types)}; there are {count} layers to name")
        window = theirs["sliding_window"] if theirs.get("use_sliding_window", True) else None
        if "sliding_attention" in types and not window:
            raise ValueError("layer_types has sliding_attention, and there is no sliding_window in use")
        seen = [window if kind == "sliding_attention" else None for kind in types]
        if len({*seen}) == 1:
            return {"window": seen[0]}
        return {f"layers.{layer}.window": window for layer, window in enumerate(seen) if window}

    def write(ours: Settings) -> Tree:
        seen = ours["windows"]
        used = sorted({window for window in seen if window})
        if len(used) > 1:
            raise ValueError(f"windows of {used} tokens; sliding_window is one number")
        switch = {"use_sliding_window": bool(used)} if "use_sliding_window" in defaults else {}
        types = ["sliding_attention" if window else "full_attention" for window in seen]
        return {"sliding_window": used[0] if used else defaults["sliding_window"], "layer_types": types, **switch}

    return Joint({"layer_types": None, **defaults}, read, write)
