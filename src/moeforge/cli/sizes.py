"""What a model is made of and what it costs, as a mapping for programs and as tables for people."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from moeforge.cli.amounts import in_bytes, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moeforge.models import LayerConfig, ModelConfig
    from moeforge.train import RunConfig

Tree = dict[str, Any]


def with_vocabulary(config: "RunConfig") -> "ModelConfig":
    """The run's model with ``vocab_size`` set; a BPE is not trained for it, but taken at its full size."""
    from moeforge.data.tokenizers import BPE, train_or_open

    if config.model.vocab_size is not None:
        return config.model
    known = isinstance(config.tokenizer, BPE)
    size = config.tokenizer.vocab_size if known else train_or_open(config.tokenizer, ()).vocab_size
    return config.model.replace(vocab_size=size)


def describe(config: "ModelConfig", bytes_per_weight: int = 4, seq_len: int | None = None) -> Tree:
    """Layers, parameters by the three conventions, FLOPs at ``seq_len`` (default: the longest) and memory."""
    from moeforge.models import measure

    context = seq_len or config.max_seq_len
    size = measure(config, bytes_per_weight, context)
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "layers": [_layer(config, layer) for layer in config.all_layers],
        "num_repeats": config.num_repeats,
        "total_params": asdict(size.total),
        "active_params": asdict(size.active),
        "context": context,
        "flops_per_token": size.flops_per_token,
        "weight_bytes": size.weight_bytes,
        # A row of the input table is read, not the table; where it is the output matrix too, all of it is.
        "read_bytes": bytes_per_weight
        * (size.active.all if config.tie_embeddings else size.active.without_input_embedding),
        "optimizer_bytes": size.optimizer_bytes,
        "kv_bytes_per_token": size.kv_bytes_per_token,
        "kv_bytes": size.kv_bytes_per_token * context,
    }


def with_packed(tree: Tree, config: "ModelConfig", bytes_per_weight: int, packed: Tree) -> Tree:
    """What ``describe`` found, with the bytes of experts as they lie in a compressed folder."""
    from moeforge.hub.store import packed_bytes

    weights, read = tree["weight_bytes"], tree["read_bytes"]
    for layer, count, own, served in packed_bytes(config, packed):
        found, plain = tree["layers"][layer], count * bytes_per_weight
        weights += own - plain
        read += (served - plain) * found["experts_per_token"] / found["num_experts"]
    return {**tree, "weight_bytes": weights, "read_bytes": read}


def summarise(family: str, tree: Tree) -> Tree:
    """The few numbers that models are compared by, from what ``describe`` found. Of layers that differ, the largest."""
    sparse = [layer for layer in tree["layers"] if "experts" in layer]
    active = tree["active_params"]
    per_token = max((layer["experts_per_token"] for layer in sparse), default=0)
    return {
        "family": family,
        "num_layers": len(tree["layers"]),
        "num_experts": max((layer["num_experts"] for layer in sparse), default=0),
        "top_k": int(per_token) if per_token == int(per_token) else per_token,
        "total_params": tree["total_params"]["all"],
        "active_params": active["all"],
        "active_params_no_input_embedding": active["without_input_embedding"],
        "active_params_no_embeddings": active["without_embeddings"],
        "bytes": tree["weight_bytes"],
        "kv_bytes_per_token": tree["kv_bytes_per_token"],
    }


def _layer(config: "ModelConfig", layer: "LayerConfig") -> Tree:
    heads = config.num_heads if layer.attends else 0
    shape = {"num_heads": heads, "num_kv_heads": config.num_key_heads, "head_dim": config.size_of_head}
    if layer.attention.router:
        shape |= {"num_heads": layer.attention.num_experts * layer.attention.per_expert(config)}
        shape |= {"heads_per_token": layer.attention.per_token(config)}
    if layer.moe is None:
        return {**shape, "d_ff": layer.d_ff, "activation": layer.activation}
    return {
        **shape,
        "num_experts": layer.moe.num_experts,
        "experts": [bank.model_dump() for bank in layer.moe.experts],
        "experts_per_token": layer.moe.heads * layer.moe.router.select.mean_experts(layer.moe.num_experts),
        "shared": layer.moe.shared.model_dump() if layer.moe.shared else None,
    }


def show(tree: Tree, console: "Console") -> None:
    """Prints what ``describe`` found."""
    console.print(_layers(tree), _parameters(tree), highlight=False)
    if tree["num_repeats"] > 1:
        console.print(f"all layers are passed {tree['num_repeats']} times, with the same weights", highlight=False)
    context = f"context {tree['context']:,}"
    console.print(f"FLOPs per token  {short(tree['flops_per_token'])}  (forward pass, {context})", highlight=False)
    console.print(f"weights          {in_bytes(tree['weight_bytes'])}", highlight=False)
    training = in_bytes(tree["optimizer_bytes"])
    console.print(f"training         {training}  (float32 weights, gradients, two AdamW moments)", highlight=False)
    cache = f"{in_bytes(tree['kv_bytes'])}  ({context}; {in_bytes(tree['kv_bytes_per_token'])} per token)"
    console.print(f"KV cache         {cache}", highlight=False)


def _layers(tree: Tree) -> "Table":
    from rich.table import Table

    table = Table("layer", "attention", "MLP or experts", "per token", "shared", title_justify="left")
    for number, layer in _runs(tree["layers"]):
        chosen = f"{layer['heads_per_token']:g} of " if "heads_per_token" in layer else ""
        heads = f"{chosen}{layer['num_heads']} x {layer['head_dim']}" if layer["num_heads"] else "none"
        if layer["num_heads"] and layer["num_kv_heads"] != layer["num_heads"]:
            heads += f", {layer['num_kv_heads']} kv"
        if "d_ff" in layer:
            table.add_row(number, heads, f"dense {layer['d_ff']} {layer['activation']}", "", "")
            continue
        banks = " + ".join(f"{bank['num_experts']} x {_width(bank)}" for bank in layer["experts"])
        shared = layer["shared"]
        beside = f"{shared['num_shared_experts']} x {_width(shared)}, {shared['mix']['type']}" if shared else ""
        table.add_row(number, heads, f"experts {banks}", f"{layer['experts_per_token']:g}", beside)
    return table


def _runs(layers: list[Tree]) -> Iterator[tuple[str, Tree]]:
    """Layers, with their numbers; those alike that follow one another are one line."""
    start = 0
    for layer, alike in groupby(layers):
        end = start + len(list(alike)) - 1
        yield (f"{start}" if start == end else f"{start}-{end}"), layer
        start = end + 1


def _width(bank: Tree) -> str:
    return " ".join(str(bank[name]) for name in ("d_expert", "activation") if name in bank) or str(bank.get("type"))


def _parameters(tree: Tree) -> "Table":
    from rich.table import Table

    table = Table("parameters", "all", "without input embedding", "without both embeddings")
    for name in ("total", "active"):
        count = tree[f"{name}_params"]
        table.add_row(name, *(f"{count[part]:,}" for part in count))
    return table
