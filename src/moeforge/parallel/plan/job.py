"""What is to be trained, on which mesh: weights by where they live, and rows by where they go."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

import torch
from torch import Tensor, nn

from moeforge.errors import UserError
from moeforge.models import Decoder, LayerConfig, ModelConfig
from moeforge.parallel.layout import Layout
from moeforge.parallel.sharding import dealt


@dataclass(frozen=True)
class Arrangement:
    """So many processes, and what they are told: ``expert`` neighbours share the experts, as in ``parallel.mesh``."""

    size: int
    expert: int = 1
    shard: bool = False
    recompute: bool = False
    chunks: int = 1
    """Parts in which rows are exchanged, where there is something to exchange."""

    @property
    def layout(self) -> Layout:
        """As ``moeforge train`` takes it."""
        return Layout(ep=self.expert, shard=self.shard, chunks=self.chunks)

    @property
    def data(self) -> int:
        """Processes that hold the same experts."""
        return self.size // self.expert

    def group(self, axis: str) -> int:
        """Processes of one group along ``expert``, ``data``, or ``world``."""
        return {"expert": self.expert, "data": self.data, "world": self.size}[axis]


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
        """[D or 1, P] tokens of each process in a micro-batch; D is 1 where all data groups are alike."""
        each, more = divmod(self.batch_size, arrangement.size)
        rows_W = each + (torch.arange(arrangement.size) < more)
        rows_DP = rows_W.view(arrangement.data, arrangement.expert).double() * self.seq_len
        return rows_DP if more else rows_DP[:1]

    def edges(self, depth: int, arrangement: Arrangement) -> Tensor:
        """[D or 1, P, E] rows that each process has for each expert of the layer at ``depth``, in a micro-batch.

        Raises UserError for loads of another number of experts or processes.
        """
        moe = self.model.applied_layers[depth].moe
        assert moe is not None
        load = self.loads.get(depth, torch.ones(moe.num_experts, dtype=torch.float64) / moe.num_experts).double()
        wanted = ((moe.num_experts,), (arrangement.size, moe.num_experts))
        if load.shape not in wanted:
            raise UserError(f"loads of layer {depth} are {list(load.shape)}: it has {moe.num_experts} experts")
        if load.ndim == 2:
            return load.view(arrangement.data, arrangement.expert, -1)
        rows = self.model.d_model / moe.row_width(self.model.d_model)
        mean = rows * moe.router.select.mean_experts(moe.num_experts)
        return self.tokens(arrangement)[..., None] * mean * load


@dataclass(frozen=True)
class Weights:
    """The decoder's parameters by where they live; those of one list travel together."""

    blocks: list[list[nn.Parameter]]
    """By layer, what every process has."""
    root: list[nn.Parameter]
    """Embedding, last norm, output."""
    banks: list[dict[int, list[nn.Parameter]]]
    """By layer, of each bank whose experts are dealt out, by its number: one process' share."""
    everywhere: list[nn.Parameter]
    """``blocks`` and ``root``, in the model's order."""

    @classmethod
    def of(cls, job: Job, arrangement: Arrangement) -> "Weights":
        """Raises UserError when experts cannot be dealt out so."""
        model = job.decoder
        names = dealt(job.model, arrangement.layout)
        away = {id(p) for name in names for p in model.get_submodule(name).parameters()}
        inside = {id(p) for p in model.blocks.parameters()}
        banks: list[dict[int, list[nn.Parameter]]] = [{} for _ in model.blocks]
        for name in names:
            _, depth, *_, number = name.split(".")
            banks[int(depth)][int(number)] = [
                share(p, arrangement.expert) for p in model.get_submodule(name).parameters()
            ]
        return cls(
            blocks=[[p for p in block.parameters() if id(p) not in away] for block in model.blocks],
            root=[p for p in model.parameters() if id(p) not in inside],
            banks=banks,
            everywhere=[p for p in model.parameters() if id(p) not in away],
        )

    @property
    def shared_out(self) -> list[nn.Parameter]:
        """All that is dealt out."""
        return [p for banks in self.banks for bank in banks.values() for p in bank]


def share(parameter: nn.Parameter, parts: int) -> nn.Parameter:
    """The largest piece of a parameter that is cut along its first dimension."""
    return nn.Parameter(parameter.new_empty(ceil(len(parameter) / parts), *parameter.shape[1:]))


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
