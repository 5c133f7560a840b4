"""``moeforge train --dry-run``: what a run would do and cost, without writing anything."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.cli.amounts import in_bytes, short
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.models import ModelConfig
    from moeforge.train import RunConfig

Tree = dict[str, Any]


def look_ahead(config: "RunConfig", before: "RunConfig", out: Path) -> Tree:
    """Everything known ahead of a run. Raises UserError for a missing corpus, device or engine."""
    from moeforge.cli.sizes import describe, with_vocabulary
    from moeforge.config import difference
    from moeforge.models.memory import activation_bytes

    _find_text(config)
    model = with_vocabulary(config)
    tokens, width = config.batch_size * config.seq_len, 2 if config.dtype == "bfloat16" else 4
    return {
        "name": config.name,
        "out": str(out),
        "changed": difference(before.model_dump(mode="json"), config.model_dump(mode="json")),
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "model": describe(model, seq_len=config.seq_len),
        "engines": engines(config, model),
        "activation_bytes": round(activation_bytes(model, width, tokens, config.recompute_activations)),
    }


def show(tree: Tree) -> None:
    """Prints what ``look_ahead`` found."""
    import yaml
    from rich.console import Console

    from moeforge.cli.sizes import show as show_sizes

    console = Console()
    changed = yaml.safe_dump(tree["changed"], sort_keys=False).rstrip() if tree["changed"] else "nothing"
    show_sizes(tree["model"], console)
    for row in tree["engines"]:
        layers = ", ".join(map(str, row["layers"]))
        print(f"experts          engine {row['engine']} ({row['why']}) in layers {layers}")
    total = tree["model"]["optimizer_bytes"] + tree["activation_bytes"]
    print(f"memory           about {in_bytes(total)}, {in_bytes(tree['activation_bytes'])} of it activations")
    print(f"tokens           {short(tree['tokens'])} in {tree['steps']:,} steps")
    print(f"changed          {changed}" if changed == "nothing" else f"changed\n{changed}")
    print(f"would be written to {tree['out']}; nothing was")


def _find_text(config: "RunConfig") -> None:
    """Reads the first document. A named dataset is left alone: looking at it may download it."""
    from moeforge.data.corpora import Datasets

    if not isinstance(config.data, Datasets) and next(iter(config.data.documents()), None) is None:
        raise UserError(f"the corpus {config.data.type} has no document")


def engines(config: "RunConfig", model: "ModelConfig") -> list[Tree]:
    """Which engine runs which layers' experts, and why."""
    import torch

    from moeforge.kernels import choose
    from moeforge.moe.bank import MLPExperts
    from moeforge.train import choose_device

    x_TD = torch.empty(1, model.d_model, dtype=getattr(torch, config.dtype), device=choose_device(config.device))
    layers: dict[tuple[str, str], list[int]] = {}
    for number, layer in enumerate(model.all_layers):
        for bank in layer.moe.experts if layer.moe else ():
            if isinstance(bank, MLPExperts):
                width = bank.d_expert * (2 if bank.activation.endswith("glu") else 1)
                up_EHD = torch.empty(bank.num_experts, width, model.d_model, device="meta")
                down_EDH = torch.empty(bank.num_experts, model.d_model, bank.d_expert, device="meta")
                numbers = layers.setdefault(choose(x_TD, up_EHD, down_EDH, bank.engine), [])
                numbers += [number] if number not in numbers else []
    return [{"engine": name, "why": why, "layers": numbers} for (name, why), numbers in layers.items()]
