"""Many processes that train one model: what ``ranks.Alone`` answers for one."""

import copy
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moeforge.config import Tree
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.models import Decoder
from moeforge.parallel.by_index import ByIndex
from moeforge.parallel.chunks import Chunks
from moeforge.parallel.exchange import Exchange
from moeforge.parallel.fetch import Fetch
from moeforge.parallel.gradients import clip_gradients, sum_gradients
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.piece import Piece
from moeforge.parallel.rebalance import Rebalance
from moeforge.parallel.sharding import Sharding
from moeforge.parallel.wire import KINDS, Wire

T = TypeVar("T")
JOIN_WITHIN = timedelta(minutes=2)
"""For the first process to be there."""
PATIENCE = timedelta(minutes=30)
"""With processes that are there: the first one may have a text to read before the others."""


class Together:
    """Many processes, each with rows of its own and a part of the parameters. All methods are collective."""

    def __init__(self, mesh: Mesh, layout: Layout) -> None:
        self.mesh, self.layout = mesh, layout
        self.wire, self.chunks = Wire(layout.processes_per_node(mesh.size)), Chunks(layout.chunks)
        self.size, self.first = mesh.size, mesh.rank == 0
        self.speakers: ProcessGroup = mesh.world_group
        """By whom ``gather`` gathers, and checkpoints are written."""

    def for_a_thread(self) -> "Together":
        """The same processes with connections of their own: what a thread says is not mixed up with what others do."""
        apart = copy.copy(self)
        group = dist.new_group(backend="gloo")
        assert isinstance(group, ProcessGroup)  # of which this process is one
        apart.speakers = group
        return apart

    def place(self, model: Decoder) -> None:
        """Spreads the parameters, in place. Raises UserError for what cannot be."""
        mesh, wire = self.mesh, self.wire
        position = mesh.grid.get_local_rank("expert")
        exchange: Exchange | Fetch | ByIndex = Exchange(mesh.levels, wire, self.chunks, position)
        if self.layout.fetch or self.layout.by_index:
            exchange = (Fetch if self.layout.fetch else ByIndex)(mesh.expert_group, wire)
        self.sharding = Sharding(model, mesh, exchange, self.layout)
        self.rebalance = Rebalance(self.layout.rebalance, model, self.sharding, wire) if self.layout.rebalance else None

    def settle(self, step: int, loads: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """``step`` steps are done, the last of which gave experts these loads: they may move."""
        if self.rebalance is not None:
            self.rebalance.after(step, loads, optimizer)

    def whereabouts(self) -> Tree:
        """What a checkpoint keeps of experts that move, so that a run goes on with them where they were."""
        return {} if self.rebalance is None else self.rebalance.whereabouts()

    def take_up(self, whereabouts: Tree) -> None:
        """The run whose tensors will be read next had experts there: where they move here too, they begin there."""
        if self.rebalance is not None:
            self.rebalance.take_up(whereabouts)

    def begin(self, seed: int, step: int) -> None:
        """A step: counts from zero, random numbers that are each process' own, and of which no checkpoint need know."""
        self.wire.clear()
        self.chunks.begin()
        digest = hashlib.sha256(f"{seed}/{step}/{self.mesh.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def sent(self) -> dict[str, int]:
        """Ends a step: bytes that all processes have sent since it began, by kind; but for those that this sum takes.

        With several machines, ``far/KIND`` are those to another one, ``far/messages`` counts those of all-to-alls.
        """
        counts = {kind: self.wire.sent[kind] for kind in KINDS}
        if self.wire.node_size != self.size:
            counts |= {f"far/{kind}": self.wire.far[kind] for kind in (*KINDS, "messages")}
        self.chunks.end(self.mesh.world_group, self.mesh.world.device_type)
        summed = torch.tensor(list(counts.values()), device=self.mesh.world.device_type)
        return dict(zip(counts, self.total(summed).tolist(), strict=True))

    def own(self, batch: Batch) -> Batch:
        """This process' rows, of as even shares as there are, maybe none; ``num_bytes`` stays that of all."""
        return batch.with_each(lambda tensor_BL: tensor_BL.tensor_split(self.size)[self.mesh.rank])

    def total(self, values: Tensor) -> Tensor:
        """Summed over all processes, in place."""
        self.wire.all_reduce(values, self.mesh.world_group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.total(torch.tensor([float(flag)], device=self.mesh.world.device_type)))

    def gather(self, value: T) -> list[T]:
        """Every process' value, by rank. Not counted: for what happens seldom."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.speakers)
        return values  # type: ignore[return-value]

    def clip(self, model: Decoder, max_norm: float) -> Tensor:
        """Sums the gradients over the processes, scales them down to ``max_norm``; returns the norm that they had."""
        sum_gradients(self.sharding, self.wire)
        return clip_gradients(self.sharding, self.wire, max_norm)

    def parameters(self, model: Decoder) -> dict[str, nn.Parameter]:
        """By name, as the optimizer has them."""
        return self.sharding.parameters

    def whole(self, name: str, tensor: Tensor) -> Tensor | Piece:
        """A parameter, or its like, as a piece of the whole model's: shares its memory."""
        return self.sharding.whole(name, tensor)


@contextmanager
def join(layout: Layout) -> Iterator[Together]:
    """The processes that torchrun started, this one among them.

    Raises UserError when they form no such mesh, cannot reach one another, or are not alike.
    """
    size, device = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
    layout.check(size)
    layout.check_device(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_WITHIN))
        store.set_timeout(PATIENCE)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the first process is not to be found at {where}: {error}") from error
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        check_alike(layout, dist.group.WORLD)
        node_size = layout.processes_per_node(size) if layout.two_level else None
        yield Together(Mesh.build(size, layout.ep, device, node_size, layout.tp), layout)
    finally:
        dist.destroy_process_group()


def check_alike(layout: Layout, group: ProcessGroup | None) -> None:
    """Raises UserError, on all processes, unless all run the same software with the same options. Collective."""
    mine = f"moeforge {version('moeforge')} on torch {torch.__version__} with {' '.join(layout.flags) or 'no options'}"
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    for rank, other in enumerate(told):
        if other != told[0]:
            raise UserError(f"processes must be alike: the first is {told[0]}; process {rank} is {other}")
