"""Checkpoints: everything a run needs to go on bit for bit. Each is whole or absent, and says when it is neither.

``step-N/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``: step, loader position, random
state, the config, and the size of each file, so that a copy that was cut short is noticed before it is used.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeforge.config import Tree, build, difference
from moeforge.errors import UserError
from moeforge.hub.folder import fit, read_tensors, write_whole
from moeforge.models import Decoder
from moeforge.train.config import RunConfig

MAY_CHANGE = {"name", "recipe", "steps", "eval_every", "eval_tokens", "save_every", "keep_checkpoints", "tensorboard"}
"""Settings that a resumed run may have otherwise; all others decide what the next step computes."""


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
    folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress, loader: Tree, config: RunConfig
) -> Path:
    """Writes ``folder/step-N``, then deletes the oldest beyond ``keep_checkpoints``. Raises UserError if it cannot."""
    target = folder / f"step-{progress.step}"

    def fill(fresh: Path) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, fresh / "model.safetensors")
        save_file({"rng": torch.get_rng_state(), **_moments(model, optimizer)}, fresh / "optimizer.safetensors")
        sizes = {path.name: path.stat().st_size for path in fresh.iterdir()}
        state = {**vars(progress), "loader": loader, "files": sizes, "config": json.loads(config.model_dump_json())}
        (fresh / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    write_whole(target, fill)
    for old in checkpoints(folder)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_checkpoint(
    path: Path, model: Decoder, optimizer: torch.optim.Optimizer, config: RunConfig
) -> tuple[Progress, Tree]:
    """Restores model, optimizer and random state in place; returns the progress and the loader's position.

    Raises UserError when the checkpoint is cut short or was written under another config.
    """
    state = _read_state(path)
    _same_config(path, state["config"], config)
    tensors = read_tensors(path / "model.safetensors")
    fit(model, tensors, path)
    model.load_state_dict(tensors)
    moments = read_tensors(path / "optimizer.safetensors")
    torch.set_rng_state(moments.pop("rng"))
    _restore_moments(model, optimizer, moments)
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


def _moments(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by parameter name: ``<kind>/<parameter>``."""
    states = [(name, optimizer.state[parameter]) for name, parameter in model.named_parameters()]
    return {f"{kind}/{name}": tensor.contiguous() for name, state in states for kind, tensor in state.items()}


def _restore_moments(model: Decoder, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        optimizer.state[parameters[name]][kind] = tensor.to(parameters[name].device) if tensor.ndim else tensor
