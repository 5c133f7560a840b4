"""Checkpoints: everything a run needs to go on bit for bit. Each is whole or absent, and says when it is neither.

``step-N/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``: step, loader position, random
state, the config, and the size of each file, so that a copy that was cut short is noticed before it is used. Several
processes write their pieces in torch's distributed format instead of the first two, one name space for both.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from moeforge.config import Tree, build, difference
from moeforge.errors import UserError
from moeforge.hub.folder import fit, read_tensors
from moeforge.hub.whole import write_whole
from moeforge.models import Decoder
from moeforge.parallel.ranks import ALONE, Ranks, State
from moeforge.train.background import Background
from moeforge.train.config import RunConfig

MAY_CHANGE = {
    *("name", "recipe", "steps", "eval_every", "eval_tokens"),
    *("save_every", "save_in_background", "keep_checkpoints", "tensorboard"),
}
"""Settings that a resumed run may have otherwise; all others decide what the next step computes."""

RANDOM = "rng"
MODEL = "model"
"""Before the names of weights, where those of the optimizer's tensors begin with their kind."""


@dataclass
class Progress:
    """Where a run stands, besides weights and optimizer."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Time spent training, without evaluation and set-up."""


def save_checkpoint(
    folder: Path,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    loader: Tree,
    config: RunConfig,
    ranks: Ranks = ALONE,
    *,
    saving: Background | None = None,
) -> Path:
    """Writes ``folder/step-N``, then deletes the oldest beyond ``keep_checkpoints``. Raises UserError if it cannot.

    With ``saving``, what there is now is copied and then written by it; ``ranks`` must be those for a thread.
    """
    target = folder / f"step-{progress.step}"
    state = _everything(model, optimizer, ranks)
    details = {**vars(progress), "loader": loader, "config": json.loads(config.model_dump_json())}
    details["experts"] = ranks.whereabouts()
    if saving is None:
        _write(target, state, details, config.keep_checkpoints, ranks)
    else:
        saving.wait()  # before there is a second copy
        state = {name: tensor.clone() for name, tensor in state.items()}
        saving.begin(lambda: _write(target, state, details, config.keep_checkpoints, ranks))
    return target


def _write(target: Path, state: State, details: Tree, keep: int, ranks: Ranks) -> None:
    if not ranks.first:
        _write_tensors(ranks.gather(target)[0], state, ranks)
        return

    def fill(fresh: Path) -> None:
        _write_tensors(ranks.gather(fresh)[0], state, ranks)
        sizes = {path.name: path.stat().st_size for path in fresh.iterdir()}
        (fresh / "state.json").write_text(json.dumps({**details, "files": sizes}, indent=1) + "\n", encoding="utf-8")

    write_whole(target, fill)
    for old in checkpoints(target.parent)[:-keep]:
        shutil.rmtree(old)


def clear_unfinished(folder: Path) -> None:
    """Deletes what a run that was killed while it wrote has left."""
    for part in folder.glob(".step-*.part-*"):
        shutil.rmtree(part, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_checkpoint(
    path: Path, model: Decoder, optimizer: torch.optim.Optimizer, config: RunConfig, ranks: Ranks = ALONE
) -> tuple[Progress, Tree]:
    """Restores model, optimizer and random state in place; returns the progress and the loader's position.

    Whatever number of processes wrote it, whatever number reads it; only with several do they share a folder of pieces.
    Raises UserError when the checkpoint is cut short or was written under another config.
    """
    state = _read_state(path)
    _same_config(path, state["config"], config)
    ranks.take_up(state.get("experts", {}))
    _read_tensors(path, model, optimizer, ranks)
    return Progress(state["step"], state["tokens"], state["seconds"]), state["loader"]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        wrong = [
            f"{name} has {(path / name).stat().st_size} of {size} bytes"
            for name, size in state["files"].items()
            if (path / name).stat().st_size != size
        ]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it to go on from the one before") from error
    if wrong:
        raise UserError(f"{path} is cut short: {'; '.join(wrong)}. Delete it to go on from the one before")
    return state


def _same_config(path: Path, saved: Tree, config: RunConfig) -> None:
    # Read anew: a setting that this version has and the one that saved had not stands at its default, as it did then.
    saved = json.loads(build(RunConfig, saved, source=f"{path}/state.json").model_dump_json())
    now = json.loads(config.model_dump_json())
    changed = sorted(key for key in {*saved, *now} - MAY_CHANGE if saved.get(key) != now.get(key))
    if changed:
        detail = {key: difference(saved.get(key), now.get(key)) for key in changed}
        raise UserError(f"{path} was written under another config; now different: {json.dumps(detail)}")


def weights(model: Decoder, ranks: Ranks) -> State:
    """What ``state_dict`` has; of several processes, each one's pieces of it."""
    parameters = ranks.parameters(model)
    return {name: ranks.whole(name, parameters.get(name, tensor)) for name, tensor in model.state_dict().items()}


def _moments(model: Decoder, optimizer: torch.optim.Optimizer, ranks: Ranks) -> State:
    """The optimizer's tensors by parameter name: ``<kind>/<parameter>``."""
    states = [(name, optimizer.state[parameter]) for name, parameter in ranks.parameters(model).items()]
    return {
        f"{kind}/{name}": ranks.whole(name, tensor) if tensor.ndim else tensor
        for name, state in states
        for kind, tensor in state.items()
    }


def _everything(model: Decoder, optimizer: torch.optim.Optimizer, ranks: Ranks) -> State:
    """All tensors of a checkpoint, in one name space; of one process, its random state too."""
    named: State = {f"{MODEL}/{name}": tensor for name, tensor in weights(model, ranks).items()}
    random: State = {RANDOM: torch.get_rng_state()} if ranks.size == 1 else {}
    return named | _moments(model, optimizer, ranks) | random


def _write_tensors(folder: Path, state: State, ranks: Ranks) -> None:
    if ranks.size > 1:
        from moeforge.parallel import store

        store.write(folder, state, ranks.speakers)
        return
    whole = {name: tensor.contiguous() for name, tensor in cast("dict[str, torch.Tensor]", state).items()}
    of_model = {name: tensor for name, tensor in whole.items() if name.startswith(f"{MODEL}/")}
    save_file({name.removeprefix(f"{MODEL}/"): t for name, t in of_model.items()}, folder / "model.safetensors")
    save_file({name: t for name, t in whole.items() if name not in of_model}, folder / "optimizer.safetensors")


def _read_tensors(path: Path, model: Decoder, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    from moeforge.parallel import store

    if (path / store.METADATA).exists():
        _make_moments(model, optimizer, store.contents(path), ranks)
        state = _everything(model, optimizer, ranks)
        state.pop(RANDOM, None)  # of several processes: theirs
        store.read(path, state)
        return
    tensors, moments = read_tensors(path / "model.safetensors"), read_tensors(path / "optimizer.safetensors")
    random = moments.pop(RANDOM)
    if ranks.size == 1:
        fit(model, tensors, path)
        torch.set_rng_state(random)
    _make_moments(model, optimizer, moments.keys(), ranks)
    for name, target in (weights(model, ranks) | _moments(model, optimizer, ranks)).items():
        store.copy_piece(target, tensors[name] if name in tensors else moments[name])


def _make_moments(model: Decoder, optimizer: torch.optim.Optimizer, keys: Collection[str], ranks: Ranks) -> None:
    """Zeros for each ``<kind>/<parameter>`` among the keys: somewhere to read into."""
    parameters = ranks.parameters(model)
    for key in keys:
        kind, _, name = key.partition("/")
        if kind != MODEL and name in parameters:
            parameter = parameters[name]
            zeros = torch.zeros(()) if kind == "step" else torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter][kind] = zeros
