"""Checkpoints in pieces: each process writes what it holds, and reads what it needs of whatever mesh wrote it."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moeforge.errors import UserError
from moeforge.parallel.piece import Piece
from moeforge.parallel.ranks import State

METADATA = ".metadata"


def write(folder: Path, state: State, group: ProcessGroup | None) -> None:
    """Collective over the group of all. Every piece is written once, by one of those that hold it."""
    writer = dcp.FileSystemWriter(folder)
    dcp.save(dict(state), storage_writer=writer, planner=_SavePlanner(), process_group=group)


def contents(folder: Path) -> dict[str, Any]:
    """Sizes and types of the tensors in a checkpoint, by name. Raises UserError when it cannot be read."""
    try:
        return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"{folder} is damaged ({error}). Delete it to go on from the one before") from error


def read(folder: Path, state: State) -> None:
    """Fills the tensors of ``state`` in place. Collective where there are several processes; one reads alone.

    Raises UserError when something is missing, damaged, or of another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as meant
            reader, alone = dcp.FileSystemReader(folder), not dist.is_initialized()
            dcp.load(dict(state), storage_reader=reader, planner=_LoadPlanner(), no_dist=alone)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{folder} does not fit or is damaged: {_first(error)}") from error


class _SavePlanner(DefaultSavePlanner):
    """Torch's, which finds the rows of a Piece too."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.chunk(index) if isinstance(found, Piece) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Torch's, which finds the rows of a Piece too."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        """Torch leaves None where it does not know what a thing is."""
        pieces = {name: piece for name, piece in state_dict.items() if isinstance(piece, Piece)}
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict.update(pieces)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.chunk(index) if isinstance(found, Piece) else super().lookup_tensor(index)


def _first(error: BaseException) -> str:
    """The first process' complaint of many."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error).strip().splitlines()[0]


@torch.no_grad()
def copy_piece(target: Tensor | Piece, whole: Tensor) -> None:
    """Copies what ``target`` holds of the whole tensor into it."""
    if isinstance(target, Piece):
        target.copy_from(whole)
        return
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        whole = whole.narrow(dim, offset, size)
    target.to_local().copy_(whole)


def gathered(state: State, keep: bool) -> dict[str, Tensor]:
    """The whole tensors, on the CPU; empty where not to be kept. Collective, one tensor at a time."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor | Piece) else tensor
        if keep:
            found[name] = whole.detach().cpu()
    return found
