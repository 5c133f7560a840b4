"""What one process holds of a tensor whose first dimension is experts, whichever they are."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moeforge.parallel.placement import Placement


class Piece:
    """Some experts of a stack. Its methods in double underscores are how torch's checkpoints ask what there is."""

    def __init__(self, shape: torch.Size, rows: Tensor, placement: Placement, group: ProcessGroup) -> None:
        """``rows`` [experts of this process, ...], which FSDP may have cut further; ``group`` is the placement's."""
        self.shape, self.placement, self.group, self.cut = shape, placement, group, rows
        experts = placement.held[group.rank()]
        low, size = 0, len(experts)
        if isinstance(rows, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(rows.shape, rows.device_mesh, rows.placements)
            low, size = offsets[0], sizes[0]
        self.rows = (rows.to_local() if isinstance(rows, DTensor) else rows).detach()
        """What is here; shares memory with what it was made of."""
        self.experts = experts[low : low + size]
        """Of each row."""

    def size(self) -> torch.Size:
        """Of the whole stack."""
        return self.shape

    def numel(self) -> int:
        """Of the whole stack."""
        return self.shape.numel()

    def clone(self) -> "Piece":
        """As it is now."""
        return Piece(self.shape, self.cut.detach().clone(), self.placement, self.group)

    @torch.no_grad()
    def copy_from(self, whole: Tensor) -> None:
        """Takes its rows of the whole stack."""
        self.rows.copy_(whole[list(self.experts)])

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """The whole stack. Collective, over the group and over those that FSDP has cut it for."""
        rows = self.cut.full_tensor() if isinstance(self.cut, DTensor) else self.cut
        padded = rows.new_zeros(max(self.placement.sizes), *self.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in self.placement.held]
        dist.all_gather(parts, padded, group=self.group)
        whole = rows.new_empty(self.shape)
        for experts, part in zip(self.placement.held, parts, strict=True):
            whole[list(experts)] = part[: len(experts)]
        return whole

    def _runs(self) -> dict[int, Tensor]:
        """Neighbouring experts as one, by the first of them; those that others have too each by itself."""
        runs: dict[int, Tensor] = {}
        alone, low = {*self.placement.replicated}, 0
        for row, expert in enumerate(self.experts):
            following = self.experts[row + 1] if row + 1 < len(self.experts) else -1
            if following != expert + 1 or alone & {expert, following}:
                runs[self.experts[low]] = self.rows[low : row + 1]
                low = row + 1
        return runs

    def _chunk(self, expert: int, rows: Tensor) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([expert, *[0] * (rows.ndim - 1)]), rows.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(expert, rows) for expert, rows in self._runs().items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        items = []
        for expert, rows in self._runs().items():
            chunk = self._chunk(expert, rows)
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(rows), self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def chunk(self, index: MetadataIndex) -> Tensor:
        """The rows that a checkpoint has at this place."""
        assert index.offset is not None
        return self._runs()[index.offset[0]]
