"""``moeforge plan``: what a step of training would cost on a cluster that need not be at hand, and on which mesh."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.amounts import in_bytes, in_seconds, short
from moeforge.cli.layout import ByIndex, Fetch, Offload, Placement, Tp, TwoLevel, Uneven
from moeforge.errors import UserError
from moeforge.parallel.launch import is_worker

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.models import ModelConfig
    from moeforge.parallel.plan.cluster import Cluster
    from moeforge.parallel.plan.job import Arrangement, Job
    from moeforge.parallel.plan.search import Candidate
    from moeforge.train import RunConfig

SHOWN = 5
"""Meshes in the table."""
LIKE = ("tp", "two_level", "fetch", "by_index", "uneven", "placement", "offload")
"""What ``moeforge train`` can be told too, and no search decides."""


def plan(
    context: typer.Context,
    what: Annotated[
        str | None, typer.Argument(metavar="RECIPE_OR_MODEL", help="A recipe, a YAML file, or a model folder.")
    ] = None,
    *,
    cluster: Annotated[Path | None, typer.Option(help="A YAML file: see docs/plan.md.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Processes that share the experts; all are tried.")] = None,
    shard: Annotated[bool | None, typer.Option("--shard/--no-shard", help="Cut all weights; both are tried.")] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Parts of an exchange; some are tried.")] = None,
    tp: Tp = 1,
    two_level: TwoLevel = False,
    fetch: Fetch = False,
    by_index: ByIndex = False,
    uneven: Uneven = False,
    placement: Placement = None,
    offload: Offload = False,
    loads: Annotated[Path | None, typer.Option(help="A run folder: experts get rows as they did there.")] = None,
    imbalance: Annotated[float, typer.Option(min=1, help="Rows of the busiest expert, over the mean.")] = 1.0,
    timeline: Annotated[Path | None, typer.Option(help="Write when who does what: .json (Chrome) or .svg.")] = None,
    place: Annotated[Path | None, typer.Option(help="Write which process should hold which experts of a run.")] = None,
    replicas: Annotated[int, typer.Option(min=0, help="With --place: copies of busy experts, in each layer.")] = 0,
    transfers: Annotated[bool, typer.Option("--transfers", help="With --place: mind the next layer too.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Measure this machine and write --cluster.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that --profile starts.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Choose the mesh for training a model on a cluster: memory, bytes, seconds of a step, and a timeline.

    Any setting of a recipe can be changed on the way: --batch_size=512; of a folder, those of its training.
    """
    _check_options(context, "--place" if place else "--profile" if profile else "planning")
    if place is not None:
        _place(what, context.obj, place, ep, replicas, transfers, as_json)
        return
    if cluster is None:
        raise UserError("name a cluster with --cluster FILE; --profile writes one of this machine into it")
    if profile:
        if what is not None:
            raise UserError("--profile measures this machine, whatever the model: leave the model out")
        _profile(context.obj, cluster, nproc)
        return
    if what is None:
        raise UserError("name a recipe, a YAML file, or a model folder")
    if loads is not None and imbalance > 1:
        raise UserError("--loads says how rows are spread, and so does --imbalance: leave one out")
    config = _run_config(what, context.obj)
    job = _job(config, _loads(config.model, loads, imbalance))
    _search(what, context, config, job, cluster)


def _search(what: str, context: typer.Context, config: "RunConfig", job: "Job", cluster: Path) -> None:
    from moeforge.parallel.plan.cluster import read_cluster
    from moeforge.parallel.plan.search import CHUNKS, Wanted, search

    devices, given = read_cluster(cluster), context.params
    tried = (given["chunks"],) if given["chunks"] else CHUNKS if devices.overlap else (1,)
    wanted = Wanted(given["ep"], given["shard"], config.recompute_activations or None, tried, _like(given))
    found = search(job, devices, wanted)
    if given["timeline"] is not None:
        from moeforge.parallel.plan.timeline import write_timeline

        write_timeline(found[0].played, found[0].arrangement, given["timeline"])
    tree = _tree(what, config, job, devices, found) | {"command": _command(what, context.obj, devices, found[0])}
    print(json.dumps(tree, indent=2)) if given["as_json"] else _show(tree)


def _check_options(context: typer.Context, mode: str) -> None:
    """Raises UserError for an option that this way of planning would not look at."""
    looks_at = {
        "--place": ("place", "ep", "replicas", "transfers", "as_json"),
        "--profile": ("profile", "cluster", "nproc"),
        "planning": (*("cluster", "ep", "shard", "chunks", *LIKE, "loads", "imbalance", "timeline", "as_json"),),
    }
    for option in context.command.params:
        given = context.params[option.name or ""]
        known = (*looks_at[mode], "what")
        if option.name not in known and given != option.default and option.name in context.params:
            wanted = next(other for other, names in looks_at.items() if option.name in names)
            raise UserError(f"{option.opts[0]} is not about {mode}: it goes with {wanted}")


def _like(params: dict[str, Any]) -> "Arrangement":
    """What all meshes are told. Raises UserError for two ways of bringing rows and experts together."""
    from moeforge.parallel.plan.job import Arrangement

    if params["fetch"] and params["by_index"]:
        raise UserError("--fetch sends no rows, --by-index all of them: leave one out")
    way = "fetch" if params["fetch"] else "by_index" if params["by_index"] else "exchange"
    node = 1 if params["two_level"] else None
    as_told = {name: params[name] for name in ("uneven", "placement", "offload")}
    return Arrangement(1, tensor=params["tp"], way=way, node=node, **as_told)


def _run_config(what: str, settings: list[str]) -> "RunConfig":
    from moeforge import recipes
    from moeforge.cli.sizes import with_vocabulary
    from moeforge.config import build, override
    from moeforge.hub.folder import config_json, model_folder, understand
    from moeforge.train import RunConfig

    if not Path(what).is_dir():
        config = recipes.load(what, settings)
        return config.replace(model=with_vocabulary(config))
    folder = model_folder(Path(what))
    model, _ = understand(config_json(folder), folder)
    return build(RunConfig, override({"model": model.model_dump()}, settings), source=what)


def _job(config: "RunConfig", loads: "dict[int, Tensor]") -> "Job":
    from moeforge.parallel.plan.job import Job

    half = config.dtype == "bfloat16"
    return Job(config.model, config.batch_size, config.seq_len, config.accumulate, half, loads=loads)


def _loads(model: "ModelConfig", run: Path | None, imbalance: float) -> "dict[int, Tensor]":
    """By depth, the share of each expert. Raises UserError where there are none, and for too much imbalance."""
    from moeforge.parallel.plan.job import skewed

    sizes = {depth: layer.moe.num_experts for depth, layer in enumerate(model.applied_layers) if layer.moe}
    if not sizes and (run is not None or imbalance > 1):
        raise UserError("no layer has experts whose loads could differ: leave --loads and --imbalance out")
    if run is not None:
        return loads_of_run(model, run)
    return {depth: skewed(size, imbalance) for depth, size in sizes.items()} if imbalance > 1 else {}


def loads_of_run(model: "ModelConfig", run: Path, steps: int | None = None) -> "dict[int, Tensor]":
    """By depth, the share of each expert in the last ``steps`` of a run; None: in the last tenth of it.

    Raises UserError for a run of another model.
    """
    import torch

    from moeforge.train.metrics import read_metrics

    lines = read_metrics(run / "metrics.jsonl")
    lines, found = lines[-(steps or max(1, len(lines) // 10)) :], {}
    for depth, layer in enumerate(model.applied_layers):
        if layer.moe is None:
            continue
        name = f"moe/tokens_per_expert/layer_{depth:02d}"
        counts = torch.tensor([line.get(name, []) for line in lines], dtype=torch.float64).sum(0)
        if len(counts) != layer.moe.num_experts or not counts.sum():
            raise UserError(
                f"{run} has no loads of {layer.moe.num_experts} experts in layer {depth}: it is a run of another model"
            )
        found[depth] = counts / counts.sum()
    return found


def _tree(what: str, config: "RunConfig", job: "Job", cluster: "Cluster", found: "list[Candidate]") -> dict[str, Any]:
    from moeforge.parallel.plan.simulate import busy_seconds
    from moeforge.parallel.plan.step import bytes_sent

    best = found[0]
    computing, sending = busy_seconds(best.played)
    return {
        "model": config.name if config.recipe else what,
        "parameters": sum(p.numel() for p in job.decoder.parameters()),
        "cluster": cluster.model_dump(exclude_none=True),
        "tokens_per_step": config.tokens_per_step,
        "idle_processes": max(0, cluster.size - config.batch_size),
        "meshes": [_mesh(each, config.tokens_per_step) for each in found],
        "bytes": bytes_sent(best.parts, best.arrangement),
        "seconds": {"step": best.seconds, "computing": computing, "sending": sending},
    }


def _mesh(found: "Candidate", tokens: int) -> dict[str, Any]:
    return {
        **asdict(found.arrangement),
        "data": found.arrangement.data,
        "seconds": found.seconds,
        "tokens_per_second": tokens / found.seconds,
        "memory": {**asdict(found.memory), "total": found.memory.total},
    }


def _command(what: str, settings: list[str], cluster: "Cluster", found: "Candidate") -> str:
    """What starts it; of a model folder, which says nothing of a run, the options alone."""
    arrangement = found.arrangement
    flags = "".join(f" {flag}" for flag in arrangement.layout.flags)
    flags += " --recompute_activations=true" * arrangement.recompute
    flags += "".join(f" {setting}" for setting in settings)
    if Path(what).is_dir():
        return f"moeforge train ...{flags}"
    if cluster.nodes == 1:
        return f"moeforge train {what}{f' --nproc {arrangement.size}' * (arrangement.size > 1)}{flags}"
    start = f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node}"
    return f"{start} ... -m moeforge train {what}{flags}"


def _show(tree: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    place = tree["cluster"]
    print(
        f"{tree['model']}: {short(tree['parameters'])} parameters on {place['nodes']} x {place['devices_per_node']} "
        f"devices of {place['name']}, {short(tree['tokens_per_step'])} tokens a step"
    )
    table = Table("mesh", "step", "tokens/s", "memory")
    for mesh in tree["meshes"][:SHOWN]:
        row = in_seconds(mesh["seconds"]), short(mesh["tokens_per_second"]), in_bytes(mesh["memory"]["total"])
        table.add_row(_named(mesh), *row)
    Console().print(table, highlight=False)
    if len(tree["meshes"]) > SHOWN:
        print(f"                 {len(tree['meshes']) - SHOWN} more fit: --json has all")
    print("of the first mesh, a step:")
    held = {name: size for name, size in tree["meshes"][0]["memory"].items() if name != "total"}
    print(f"memory           {', '.join(f'{name} {in_bytes(size)}' for name, size in held.items() if size)}")
    sent = ", ".join(f"{kind} {in_bytes(count)}" for kind, count in tree["bytes"].items() if count)
    print(f"sent             {sent or 'nothing'}  (all processes together)")
    seconds = tree["seconds"]
    print(f"time             {in_seconds(seconds['computing'])} computing, {in_seconds(seconds['sending'])} sending")
    if tree["idle_processes"]:
        print(f"idle             {tree['idle_processes']} processes have no row: raise --batch_size")
    print(f"to run it        {tree['command']}")


def _named(mesh: dict[str, Any]) -> str:
    from moeforge.parallel.plan.job import Arrangement
    from moeforge.parallel.plan.search import describe

    return describe(Arrangement(**{name: mesh[name] for name in Arrangement.__dataclass_fields__}))


def _place(
    what: str | None, settings: list[str], out: Path, ep: int | None, replicas: int, transfers: bool, as_json: bool
) -> None:
    from moeforge.cli.plan_places import Options, place, show_places

    if what is None or ep is None or ep == 1:
        raise UserError("--place needs a run folder, and --ep with the processes that share its experts")
    if settings:
        raise UserError(f"{settings[0]}: a run's settings are fixed")
    if replicas and transfers:
        raise UserError("--transfers places each expert once: leave --replicas out")
    told = place(Path(what), Options(ep, replicas, transfers), out)
    print(json.dumps(told, indent=2)) if as_json else show_places(told)


def _profile(settings: list[str], cluster: Path, nproc: int) -> None:
    from moeforge.parallel.launch import launch, one_voice

    if not is_worker():
        if nproc == 1:
            raise UserError("--profile needs two processes or more, to measure what lies between them: add --nproc")
        if not cluster.parent.is_dir():
            raise UserError(f"--cluster {cluster}: there is no folder {cluster.parent}")
        command = ["plan", "--profile", "--cluster", str(cluster), *settings]
        again = f"moeforge {' '.join(command)} --nproc {nproc}"
        launch(nproc, command, again, cluster.with_suffix(".logs"))
        print(f"wrote {cluster}: moeforge plan RECIPE --cluster {cluster}")
        return
    import torch

    from moeforge.cli.plan_steps import timed_steps
    from moeforge.config import build, override
    from moeforge.parallel.layout import Layout
    from moeforge.parallel.plan.profile import profile
    from moeforge.parallel.together import join
    from moeforge.train import RunConfig

    config = build(RunConfig, override({}, settings))
    with one_voice(), join(Layout()) as ranks:
        profile(ranks, cluster, getattr(torch, config.dtype), timed_steps(config, ranks))
