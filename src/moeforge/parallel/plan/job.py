"""What is to be trained, on which mesh: weights by where they live, and rows by where they go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from moeforge.errors import UserError
from moeforge.models import Decoder, LayerConfig, ModelConfig
from moeforge.parallel.layout import Layout
from moeforge.parallel.placement import Placement
from moeforge.parallel.sharding import dealt
from moeforge.parallel.slices import check_slices, sliced

T = TypeVar("T")


@dataclass(frozen=True)
class Arrangement:
    """So many processes, and what they are told: as in ``parallel.mesh``, ``expert`` neighbouring tensor groups of
    ``tensor`` neighbours each share the experts, and are a team."""

    size: int
    expert: int = 1
    shard: bool = False
    recompute: bool = False
    chunks: int = 1
    """Parts in which rows are exchanged, where there is something to exchange."""
    tensor: int = 1
    """Processes that hold slices of the same matrices."""
    way: Literal["exchange", "fetch", "by_index"] = "exchange"
    """How rows and experts come together."""
    node: int | None = None
    """Processes of a machine, where rows go by two levels of links."""
    uneven: bool = False
    """Experts may be dealt out in shares that differ by one."""
    placement: str | None = None
    """File that says which process of a team holds which experts."""
    offload: bool = False
    """What FSDP cuts stays in the host's memory."""

    @property
    def layout(self) -> Layout:
        """As ``moeforge train`` takes it."""
        return Layout(
            ep=self.expert,
            shard=self.shard,
            node_size=self.node,
            two_level=self.node is not None,
            chunks=self.chunks,
            uneven=self.uneven,
            placement=self.placement,
            fetch=self.way == "fetch",
            tp=self.tensor,
            by_index=self.way == "by_index",
            offload=self.offload,
        )

    @property
    def team(self) -> int:
        """Processes that hold all of the model between them."""
        return self.expert * self.tensor

    @property
    def data(self) -> int:
        """Teams, of which all hold the same."""
        return self.size // self.team

    @property
    def cuts_banks(self) -> bool:
        """Whether FSDP has experts that are dealt out."""
        return self.shard and (self.data > 1 or self.offload)

    @property
    def inside(self) -> int:
        """Tensor groups of a team that are on one machine, where rows go by two levels."""
        return self.expert if self.node is None else self.node // self.tensor

    def group(self, axis: str) -> int:
        """Processes of one group along an axis.

        ``slice``: those with the same slices of what only the tensor axis cuts; ``same``: with the same experts, where
        that does not cut them; ``inside`` and ``across``: of an expert group, on one machine, and one of each.
        """
        return {
            "tensor": self.tensor,
            "expert": self.expert,
            "inside": self.inside,
            "across": self.expert // self.inside,
            "data": self.data,
            "slice": self.size // self.tensor,
            "same": self.size // self.expert,
            "world": self.size,
        }[axis]

    def mean(self, values_DQ: Tensor) -> Tensor:
        """[D or 1, Q, ...] -> the same: of each process, the mean of its tensor group."""
        mean = values_DQ.unflatten(1, (-1, self.tensor)).mean(2, keepdim=True)
        return mean.expand(-1, -1, self.tensor, *values_DQ.shape[2:]).flatten(1, 2)

    def of_positions(self, values: list[int]) -> Tensor:
        """One for each process of an expert group -> [1, Q]."""
        return torch.tensor([values], dtype=torch.float64).repeat_interleave(self.tensor, 1)

    def total(self, values_DQ: Tensor, axis: str) -> Tensor:
        """[D or 1, Q] -> the same: of each process, the sum of its group along ``expert`` or ``tensor``."""
        apart = values_DQ.expand(-1, self.team).unflatten(1, (self.expert, self.tensor))
        return apart.sum(1 if axis == "expert" else 2, keepdim=True).expand_as(apart).flatten(1)

    def latest(self, values_DQ: Tensor, axis: str) -> Tensor:
        """[D or 1, Q or 1] -> the same: of each process, the largest of its group along an axis."""
        if axis == "world":
            return values_DQ.amax().view(1, 1)
        if self.team == self.expert == self.inside:  # an axis is a dimension
            return values_DQ if axis == "tensor" else values_DQ.amax(1 if axis == "expert" else 0, keepdim=True)
        # [data, machine, place in it, slice]
        apart = values_DQ.expand(-1, self.team).reshape(-1, self.expert // self.inside, self.inside, self.tensor)
        dims = {"tensor": 3, "inside": 2, "across": 1, "expert": (1, 2), "data": 0, "slice": (0, 1, 2), "same": (0, 3)}
        return apart.amax(dims[axis], keepdim=True).expand(-1, *apart.shape[1:]).flatten(1)


@dataclass(frozen=True)
class Job:
    """A training run as a planner knows it. ``model.vocab_size`` is set."""

    model: ModelConfig
    batch_size: int
    """Sequences of a micro-batch, of all processes together."""
    seq_len: int
    accumulate: int = 1
    half: bool = True
    """Whether matrix products are bf16."""
    dtype: torch.dtype = torch.float32
    """Of weights, gradients and moments."""
    loads: Mapping[int, Tensor] = field(default_factory=dict)
    """By depth: [E] share of the rows that each expert gets, or [W, E] rows of each process for each expert in one
    micro-batch. Where nothing is said, all experts get as many."""

    @property
    def value(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def row(self) -> int:
        """Bytes of a value in a matrix product."""
        return 2 if self.half else self.value

    @cached_property
    def decoder(self) -> Decoder:
        """On the meta device."""
        with torch.device("meta"):
            return Decoder(self.model).to(self.dtype)

    def tokens(self, arrangement: Arrangement) -> Tensor:
        """[D or 1, Q] tokens of each process of a team in a micro-batch; D is 1 where all teams are alike."""
        each, more = divmod(self.batch_size, arrangement.size)
        rows_W = each + (torch.arange(arrangement.size) < more)
        rows_DQ = rows_W.view(arrangement.data, arrangement.team).double() * self.seq_len
        return rows_DQ if more else rows_DQ[:1]

    def edges(self, depth: int, arrangement: Arrangement) -> Tensor:
        """[D or 1, Q, E] rows that each process has for each expert of the layer at ``depth``, in a micro-batch.

        Raises UserError for loads of another number of experts or processes.
        """
        moe = self.model.applied_layers[depth].moe
        assert moe is not None
        load = self.loads.get(depth, torch.ones(moe.num_experts, dtype=torch.float64) / moe.num_experts).double()
        wanted = ((moe.num_experts,), (arrangement.size, moe.num_experts))
        if load.shape not in wanted:
            raise UserError(f"loads of layer {depth} are {list(load.shape)}: it has {moe.num_experts} experts")
        if load.ndim == 2:
            return load.view(arrangement.data, arrangement.team, -1)
        rows = self.model.d_model / moe.row_width(self.model.d_model)
        mean = rows * moe.router.select.mean_experts(moe.num_experts)
        return self.tokens(arrangement)[..., None] * mean * load


@dataclass(frozen=True)
class Weights:
    """The decoder's parameters by where they live, as one process has them before FSDP cuts them."""

    blocks: list[list[nn.Parameter]]
    """By layer, what is not dealt out."""
    root: list[nn.Parameter]
    """Embedding, last norm, output."""
    banks: list[dict[int, list[nn.Parameter]]]
    """By layer, of each bank whose experts are dealt out, by its number: all of its experts."""
    places: list[dict[int, Placement]]
    """Of these banks: who holds which experts."""
    everywhere: list[nn.Parameter]
    """``blocks`` and ``root``, in the model's order."""
    cut: set[int]
    """``id`` of what the tensor axis has cut."""

    @classmethod
    def of(cls, job: Job, arrangement: Arrangement) -> "Weights":
        """Raises UserError when experts, or matrices, cannot be dealt out so."""
        model, tensor, names = job.decoder, arrangement.tensor, dealt(job.model, arrangement.layout)
        check_slices(job.model, tensor)
        dims = {name: dim for name, dim, _ in sliced(model, tensor)} if tensor > 1 else {}
        own = {name: share(p, tensor, dims[name]) if name in dims else p for name, p in model.named_parameters()}
        cut = {id(own[name]) for name in dims}
        banks: list[dict[int, list[nn.Parameter]]] = [{} for _ in model.blocks]
        places: list[dict[int, Placement]] = [{} for _ in model.blocks]
        for name, placement in names.items():
            _, depth, *_, number = name.split(".")
            keys = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()]
            banks[int(depth)][int(number)] = [own.pop(key) for key in keys]
            places[int(depth)][int(number)] = placement
        blocks = [f"blocks.{depth}." for depth in range(len(model.blocks))]
        return cls(
            blocks=[[p for name, p in own.items() if name.startswith(block)] for block in blocks],
            root=[p for name, p in own.items() if not name.startswith("blocks.")],
            banks=banks,
            places=places,
            everywhere=[*own.values()],
            cut=cut,
        )

    def held(self, depth: int, number: int, position: int, cut: bool | None = None) -> list[nn.Parameter]:
        """What one of a team has of a bank; only what the tensor axis cuts, or does not."""
        experts = self.places[depth][number].sizes[position]
        stacks = [p for p in self.banks[depth][number] if cut in (None, id(p) in self.cut)]
        return [nn.Parameter(p.new_empty(experts, *p.shape[1:])) for p in stacks]

    def dealt(self, position: int, cut: bool | None = None) -> list[nn.Parameter]:
        """The same of all banks."""
        return [
            part
            for depth, banks in enumerate(self.banks)
            for number in banks
            for part in self.held(depth, number, position, cut)
        ]

    def of_each(self, value: Callable[[int], T]) -> list[T]:
        """A value of every process of an expert group; of those that hold as many experts, found once."""
        sizes = [placement.sizes for places in self.places for placement in places.values()]
        found: dict[tuple[int, ...], T] = {}
        kinds = [*zip(*sizes, strict=True)] or [()]
        for place, kind in enumerate(kinds):
            if kind not in found:
                found[kind] = value(place)
        return [found[kind] for kind in kinds]

    def size(self, arrangement: Arrangement) -> int:
        """Bytes of the process that holds most."""
        cut = (arrangement.group("slice"), arrangement.data) if arrangement.shard else (1, 1)
        return nbytes(self.everywhere, cut[0]) + max(self.of_each(lambda place: nbytes(self.dealt(place), cut[1])))

    def sliced(self, parameters: list[nn.Parameter], cut: bool) -> list[nn.Parameter]:
        """Those that the tensor axis cuts, or does not."""
        return [p for p in parameters if (id(p) in self.cut) == cut]


def share(parameter: nn.Parameter, parts: int, dim: int = 0) -> nn.Parameter:
    """The largest piece of a parameter that is cut along a dimension."""
    shape = [*parameter.shape]
    shape[dim] = ceil(shape[dim] / parts)
    return nn.Parameter(parameter.new_empty(shape))


def nbytes(parameters: list[nn.Parameter], parts: int = 1) -> int:
    """Of the largest piece of each, where they are cut into ``parts``."""
    return sum(ceil(len(p) / parts) * p.shape[1:].numel() * p.element_size() for p in parameters)


def experts_of(layer: LayerConfig) -> list[slice]:
    """The experts of each bank of a layer, as the router numbers them."""
    return [slice(span.start, span.stop) for span in layer.moe.spans] if layer.moe else []


def skewed(num_experts: int, imbalance: float) -> Tensor:
    """[E] shares: the first expert gets ``imbalance`` times the mean, all others as much as one another.

    Raises UserError when that is more than all.
    """
    if imbalance > num_experts:
        raise UserError(f"an imbalance of {imbalance:g} is more than all rows: a layer has {num_experts} experts")
    rest = (num_experts - imbalance) / max(1, num_experts - 1) / num_experts
    share_E = torch.full((num_experts,), rest, dtype=torch.float64)
    share_E[0] = imbalance / num_experts
    return share_E
