"""Checkpoints in pieces: each process writes what it holds, and reads what it needs of whatever mesh wrote it."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moeforge.errors import UserError

State = dict[str, Tensor]
"""By name: a DTensor is this process' piece, any other tensor is the same everywhere."""
METADATA = ".metadata"


def write(folder: Path, state: State) -> None:
    """Collective. Every piece is written once, by one of those that hold it."""
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder))


def names(folder: Path) -> set[str]:
    """Of the tensors in a checkpoint. Raises UserError when it cannot be read."""
    try:
        return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    except Exception as error:
        raise UserError(f"{folder} is damaged ({error}). Delete it to go on from the one before") from error


def read(folder: Path, state: State) -> None:
    """Fills the tensors of ``state`` in place. Collective where there are several processes; one reads alone.

    Raises UserError when something is missing, damaged, or of another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as meant
            dcp.load(dict(state), storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{folder} does not fit or is damaged: {_first(error)}") from error


def _first(error: BaseException) -> str:
    """The first process' complaint of many."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error).strip().splitlines()[0]


@torch.no_grad()
def copy_piece(target: Tensor, whole: Tensor) -> None:
    """Copies what ``target`` holds of the whole tensor into it."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        whole = whole.narrow(dim, offset, size)
    target.to_local().copy_(whole)


def gathered(state: State, keep: bool) -> State:
    """The whole tensors, on the CPU; empty where not to be kept. Collective, one tensor at a time."""
    found: State = {}
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.detach().cpu()
    return found
