"""What one process holds of a tensor that is cut along some of its dimensions, into whichever indices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Axis:
    """A dimension that a group of processes has cut."""

    dim: int
    group: ProcessGroup
    held: tuple[tuple[int, ...], ...]
    """Indices of each process of the group; some may be several processes'."""

    @property
    def here(self) -> tuple[int, ...]:
        """Those of this process."""
        return self.held[self.group.rank()]

    @cached_property
    def shared(self) -> set[int]:
        """Indices that several processes hold."""
        seen: set[int] = set()
        return {index for indices in self.held for index in indices if index in seen or seen.add(index)}

    def gather(self, part: Tensor, size: int) -> Tensor:
        """The whole dimension, of this ``size``. Collective over the group."""
        part = part.movedim(self.dim, 0)
        padded = part.new_zeros(max(map(len, self.held)), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in self.held]
        dist.all_gather(parts, padded, group=self.group)
        whole = part.new_empty(size, *part.shape[1:])
        for indices, some in zip(self.held, parts, strict=True):
            whole[list(indices)] = some[: len(indices)]
        return whole.movedim(0, self.dim)


class Piece:
    """Part of a tensor. Its methods in double underscores are how torch's checkpoints ask what there is."""

    def __init__(self, shape: torch.Size, part: Tensor, axes: tuple[Axis, ...]) -> None:
        """Of a tensor of this ``shape``; ``part`` may be one of its dimensions cut further, the first, by FSDP."""
        self.shape, self.axes, self.part = shape, axes, part
        held = {axis.dim: axis.here for axis in axes}
        if isinstance(part, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(part.shape, part.device_mesh, part.placements)
            held[0] = held.get(0, tuple(range(shape[0])))[offsets[0] : offsets[0] + sizes[0]]
        self.held = held
        """By dimension, the indices that are here; all of the others."""
        self.rows = local(part).detach()
        """What is here; shares memory with what it was made of."""

    @property
    def experts(self) -> tuple[int, ...]:
        """Of each row."""
        return self.held[0]

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return self.shape

    def numel(self) -> int:
        """Of the whole tensor."""
        return self.shape.numel()

    def clone(self) -> "Piece":
        """As it is now."""
        return Piece(self.shape, self.part.detach().clone(), self.axes)

    @torch.no_grad()
    def copy_from(self, whole: Tensor) -> None:
        """Takes its part of the whole tensor."""
        self.rows.copy_(take(whole, self.held))

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """The whole tensor. Collective, over the axes' groups and over those that FSDP has cut it for."""
        whole = self.part.full_tensor() if isinstance(self.part, DTensor) else self.part
        for axis in self.axes:
            whole = axis.gather(whole, self.shape[axis.dim])
        return whole

    def _runs(self) -> dict[tuple[int, ...], Tensor]:
        """The blocks that this is made of, by where each begins in the whole tensor.

        Neighbouring indices are one; those that others have too each by itself, so that all have the same blocks.
        """
        shared, runs = {axis.dim: axis.shared for axis in self.axes}, []
        for dim, size in enumerate(self.shape):
            if dim in self.held:
                runs.append(_runs(self.held[dim], shared.get(dim, set())))
            else:
                runs.append([(0, 0, size)])
        found = {}
        for block in product(*runs):
            part = self.rows
            for dim, (_, low, high) in enumerate(block):
                part = part[(slice(None),) * dim + (slice(low, high),)]
            found[tuple(first for first, _, _ in block)] = part
        return found

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(start), part.shape) for start, part in self._runs().items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        items = []
        for start, part in self._runs().items():
            chunk = ChunkStorageMetadata(torch.Size(start), part.shape)
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(part), self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def chunk(self, index: MetadataIndex) -> Tensor:
        """The block that a checkpoint has at this place."""
        assert index.offset is not None
        return self._runs()[tuple(index.offset)]


def local(tensor: Tensor) -> Tensor:
    """What is here of one that FSDP has cut; shares its memory. Any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def take(whole: Tensor, held: Mapping[int, Sequence[int]]) -> Tensor:
    """A copy of these indices of each dimension."""
    for dim, indices in held.items():
        whole = whole.index_select(dim, torch.tensor(indices, dtype=torch.int64, device=whole.device))
    return whole


def _runs(indices: tuple[int, ...], shared: set[int]) -> list[tuple[int, int, int]]:
    """(first index, and which places among ``indices``, from and up to) of each run."""
    runs, low = [], 0
    for place, index in enumerate(indices):
        following = indices[place + 1] if place + 1 < len(indices) else -1
        if following != index + 1 or shared & {index, following}:
            runs.append((indices[low], low, place + 1))
            low = place + 1
    return runs
