"""Checkpoints of DeepSpeed's training with its MoE layers (deepspeed 0.19, runtime/engine.py): pickles, all of them.

A folder holds a tag in ``latest`` and, in the folder of that name, ``mp_rank_00_model_states.pt`` with all but the
experts and, for each of these, ``layer_{i}_expert_{e}_mp_rank_00_model_states.pt``. The files do not say what the model
computes: a ``config.json``, ours or a public family's, must lie in the folder. Tensors have the names of that format,
but for those of DeepSpeed's own modules.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeforge.errors import UserError
from moeforge.hub.families import FAMILIES
from moeforge.hub.folder import config_json, understand
from moeforge.hub.layout import Layout, Names, plan
from moeforge.hub.pretrained import Origin, Pretrained, fill
from moeforge.models import Decoder

DENSE, EXPERT = "mp_rank_00_model_states.pt", re.compile(r"layer_\d+_expert_(\d+)_mp_rank_00_model_states\.pt")
NOT_READ = {
    r"mp_rank_(?!00)\d+_model_states\.pt": "the model is cut by tensor parallelism",
    r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt": "weights are cut by ZeRO stage 3: run its zero_to_fp32.py first",
    r"layer_\d+-model_\d+-model_states\.pt": "the model is cut by pipeline parallelism",
    r"expert_\d+_mp_rank_\d+_model_states\.pt": "its experts are numbered without their layer, as at first",
    r"layer_\d+_expert_\d+_mp_rank_(?!00)\d+_model_states\.pt": "experts are cut by tensor parallelism",
}
"""Files of checkpoints that were cut otherwise, and how."""

THEIRS = {".deepspeed_moe.experts.deepspeed_experts.": ".experts.", ".deepspeed_moe.gate.wg.": ".gate."}
"""Names of DeepSpeed's modules -> what stands there in a family that has none of them."""
OURS: Names = {
    f"blocks.{{layer}}.moe.{ours}": (Layout((f"blocks.{{layer}}.moe.{theirs}",)),)
    for ours, theirs in {
        "router.gate.weight": "gate.weight",
        "banks.0.gate_up_proj": "experts.{expert}.gate_up_proj.weight",
        "banks.0.down_proj": "experts.{expert}.down_proj.weight",
        "shared.mlp.gate_up_proj.weight": "mlp.gate_up_proj.weight",
        "shared.mlp.down_proj.weight": "mlp.down_proj.weight",
        "shared.gate.weight": "coefficient.weight",
        "shared.gate.bias": "coefficient.bias",
    }.items()
}
"""A layer of ours with the MoE module of DeepSpeed in place of ours, ``use_residual`` included."""


class States:
    """All tensors of a checkpoint under the names of the model's format; files stay mapped, nothing is copied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.file_of: dict[str, Path] = {}
        for file, name, tensor in _read(folder):
            for theirs, plain in THEIRS.items():
                name = name.replace(theirs, plain)
            if name in self.tensors:
                raise UserError(f"{name} is in {self.file_of[name].name} and in {file.name}")
            self.tensors[name], self.file_of[name] = tensor, file
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, backed by its file."""
        return self.tensors[name]

    def close(self) -> None:
        """Nothing: torch maps whole pickles, and these are let go of with the last of their tensors."""


def states_folder(folder: Path) -> Path | None:
    """Where a checkpoint's files are, or None for a folder that is none."""
    latest = folder / "latest"
    tag = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    places = [folder / tag] if tag else [folder]
    return next((place for place in places if any(place.glob("*_model_states.pt"))), None)


def load(folder: Path, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder, in evaluation mode. Routing is that of config.json: nothing is dropped at a capacity.

    Raises UserError for checkpoints that are cut otherwise, and for weights that do not fit, with the names.
    """
    states = states_folder(folder)
    if states is None:
        raise UserError(f"{folder} holds no *_model_states.pt: it is no checkpoint of DeepSpeed")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} needs a config.json that says what the model computes: DeepSpeed's files do not")
    for file in sorted(states.iterdir()):
        for pattern, why in NOT_READ.items():
            if re.fullmatch(pattern, file.name):
                raise UserError(f"{file} cannot be read: {why}")
    fields = config_json(folder)
    config, _ = understand(fields, folder)
    family = FAMILIES.get(fields["model_type"])
    with torch.device("meta"):
        model = Pretrained(config, Origin(family, fields, folder)) if family else Decoder(config)
    rows = {_row(name) for name in model.state_dict()}
    names = family.names if family else {**{row: (Layout((row,)),) for row in rows}, **OURS}
    found = States(states)
    fill(model, plan(model, names, set(found.shapes)), found, set(), dtype, "cpu")
    return model.eval()


def _row(parameter: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", parameter)


def _read(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and tensor of each weight."""
    files = [folder / DENSE, *sorted(file for file in folder.iterdir() if EXPERT.fullmatch(file.name))]
    for file in files:
        tree = _unpickled(file)
        weights: Any = tree.get("module") if file.name == DENSE else tree
        if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise UserError(f"{file} holds no weights by name")
        yield from ((file, name, tensor) for name, tensor in weights.items())


def _unpickled(file: Path) -> dict[str, Any]:
    """A pickle that may build tensors, plain values, and the namespace of command-line arguments that Megatron adds."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises its own, zip's and pickle's
        raise UserError(
            f"{file} is missing, damaged, or holds more than weights: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no weights by name")
    return tree
