"""``moeforge plan RUN --place FILE``: which process should hold which experts of a trained model."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.models import Decoder, ModelConfig
    from moeforge.parallel.plan.places import Traffic

TOKENS = 60_000
"""Of validation text that loads are counted on."""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    ep: int
    replicas: int
    transfers: bool
    """Whether tokens that change processes between layers count too."""


def place(run: Path, options: Options, out: Path) -> dict[str, Any]:
    """Writes ``out`` as ``moeforge train --placement`` reads it; returns what it changes, by layer.

    Raises UserError for a folder without a finished run, or experts that cannot be placed so.
    """
    from moeforge.parallel.plan.places import assign, busiest, greedy

    depths, traffic, dealt = _measured(run)
    size, count = options.ep, len(traffic.loads)
    if options.transfers:
        found = [[[rank] for rank in ranks] for ranks in assign(traffic, size)]
    else:
        found = [greedy(load, size, options.replicas) for load in traffic.loads]
    in_order = [[[expert * size // len(load)] for expert in range(len(load))] for load in traffic.loads]
    tree = {f"layer_{depth:02d}": _entries(holders, dealt[depth]) for depth, holders in zip(depths, found, strict=True)}
    try:
        out.write_text(
            "".join(f"{layer}: {json.dumps(entries)}\n" for layer, entries in tree.items()), encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"--place {out}: {error.strerror}") from error
    rows = [
        {"layer": depths[at], "in_order": busiest(load, in_order[at], size), "placed": busiest(load, found[at], size)}
        for at, load in enumerate(traffic.loads)
    ]
    told: dict[str, Any] = {"out": str(out), "layers": rows}
    if options.transfers and count > 1:
        total = sum(float(move.sum()) for move in traffic.moves)
        plain = [[ranks[0] for ranks in holders] for holders in in_order]
        told["changes"] = {
            "in_order": traffic.moved(plain) / total,
            "placed": traffic.moved([[ranks[0] for ranks in holders] for holders in found]) / total,
        }
    return told


def show_places(told: dict[str, Any]) -> None:
    """Prints what ``place`` found."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "busiest process over the mean, in order", "as placed")
    for row in told["layers"]:
        table.add_row(str(row["layer"]), f"{row['in_order']:.3f}", f"{row['placed']:.3f}")
    Console().print(table, highlight=False)
    if "changes" in told:
        shares = [f"{told['changes'][name]:.1%}" for name in ("in_order", "placed")]
        print(f"tokens that change processes between layers: {shares[0]} in order, {shares[1]} as placed")
    print(f"wrote {told['out']}")


def _entries(holders: list[list[int]], dealt: list[bool]) -> list[Any]:
    """One process, a list of them, or null for an expert that is everywhere."""
    rest = iter(holders)
    shown = (next(rest) if own else None for own in dealt)
    return [ranks[0] if ranks is not None and len(ranks) == 1 else ranks for ranks in shown]


def _measured(run: Path) -> "tuple[list[int], Traffic, dict[int, list[bool]]]":
    """Layers, what their experts got on validation text, and which experts of each are dealt out."""
    from moeforge.config import build, read_yaml
    from moeforge.data.packing import evaluation_batches
    from moeforge.data.prepare import prepare
    from moeforge.hub import load
    from moeforge.train import RunConfig

    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no run: --place counts loads on the text that a run was trained on")
    config = build(RunConfig, read_yaml(run / "config.yaml"), source=str(run / "config.yaml"))
    model, tokenizer = load(run)
    dealt = _dealt(model.config)
    if not dealt:
        raise UserError(f"{run}: no layer has experts that processes could hold")
    text = prepare(config.data, tokenizer).validation
    batches = evaluation_batches(text, config.batch_size, config.seq_len, TOKENS)
    return sorted(dealt), _count(model, batches, dealt), dealt


def _dealt(config: "ModelConfig") -> dict[int, list[bool]]:
    from moeforge.parallel.sharding import DEALT

    found = {}
    for depth, layer in enumerate(config.all_layers):
        if layer.moe and any(isinstance(bank, DEALT) for bank in layer.moe.experts):
            found[depth] = [isinstance(bank, DEALT) for bank in layer.moe.experts for _ in range(bank.num_experts)]
    return found


def _count(model: "Decoder", batches: Any, dealt: dict[int, list[bool]]) -> "Traffic":
    import torch

    from moeforge.parallel.plan.places import Traffic

    depths = sorted(dealt)
    loads = [torch.zeros(sum(dealt[depth]), dtype=torch.float64) for depth in depths]
    moves = [torch.zeros(len(before), len(after), dtype=torch.float64) for before, after in pairwise(loads)]
    with torch.no_grad():
        for batch in batches:
            output = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
            chosen = [_chosen(output.routings[depth].route, dealt[depth]) for depth in depths]
            for load_E, chosen_TE in zip(loads, chosen, strict=True):
                load_E += chosen_TE.sum(0)
            for move_EE, (before_TE, after_TE) in zip(moves, pairwise(chosen), strict=True):
                if len(before_TE) == len(after_TE):  # else rows are not the same tokens
                    move_EE += before_TE.T @ after_TE
    return Traffic(loads, moves)


def _chosen(route: Any, dealt: list[bool]) -> "Tensor":
    """[T, E] float64: whether a row goes to an expert, of those that are dealt out."""
    import torch

    from moeforge.moe import Route

    if not isinstance(route, Route):
        raise UserError("select: soft and merged mix all rows or all experts: none has a load of its own")
    chosen_TE = torch.zeros(route.num_tokens, route.num_experts, dtype=torch.float64)
    chosen_TE.index_put_(
        (route.token, route.expert), torch.ones(len(route.token), dtype=torch.float64), accumulate=True
    )
    return chosen_TE[:, torch.tensor(dealt)]
