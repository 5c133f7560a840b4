"""Where each parameter lives: experts dealt out over the expert axis, the rest on every process or cut by FSDP."""

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from moeforge.errors import UserError
from moeforge.models import Decoder, ModelConfig
from moeforge.moe import MoEConfig
from moeforge.moe.bank import Bank, LowRankExperts, MLPExperts, NeuronExperts
from moeforge.parallel.by_index import ByIndex
from moeforge.parallel.exchange import Exchange
from moeforge.parallel.fetch import Fetch
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh, check_experts
from moeforge.parallel.piece import Axis, Piece, take
from moeforge.parallel.placement import Placement, placed, read_placements
from moeforge.parallel.slices import Slices, check_slices, share_biases, sliced
from moeforge.parallel.wire import Wire

DEALT = (MLPExperts, LowRankExperts, NeuronExperts)
"""Banks whose experts own all their weights. Others are shared, or too cheap for their rows to travel: everywhere."""


class Sharding:
    """A decoder's parameters on a mesh. The model is changed in place; each process must hold the same one before."""

    def __init__(self, model: Decoder, mesh: Mesh, exchange: Exchange | Fetch | ByIndex, layout: Layout) -> None:
        """Raises UserError where ``dealt`` does."""
        self.mesh = mesh
        self.banks = dealt(model.config, layout)
        """Who holds which experts now, by bank."""
        check_slices(model.config, layout.tp)
        self.axes: dict[str, tuple[torch.Size, tuple[Axis, ...]]] = {}
        """Whole shape of each parameter that is cut, and along what."""
        slices = {name: Axis(dim, mesh.tensor_group, held) for name, dim, held in _sliced(model, layout)}
        for name, parameter in list(model.named_parameters()):
            owner, _, key = name.rpartition(".")
            axes = [slices[name]] if name in slices else []
            if owner in self.banks:
                axes.append(Axis(0, mesh.expert_group, self.banks[owner].held))
            if axes:
                self.axes[name] = parameter.shape, tuple(axes)
                own = take(parameter.detach(), {axis.dim: axis.here for axis in axes})
                setattr(model.get_submodule(owner), key, nn.Parameter(own))
        if slices:
            share_biases(model, layout.tp)
        banks: dict[str, Bank] = {name: model.get_submodule(name) for name in self.banks}  # type: ignore[misc]
        # Rows that are exchanged are gathered where they come to; weights are fetched for rows that are gathered.
        if slices and not layout.fetch:
            Slices(model, mesh.tensor_group, exchange.wire)
        for name, bank in banks.items():
            exchange.install(bank, partial(self.banks.__getitem__, name))
        if slices and layout.fetch:
            Slices(model, mesh.tensor_group, exchange.wire)
        if layout.shard:
            _fully_shard(model, list(banks.values()), mesh, exchange.wire, layout.offload)
        # Kept, as FSDP puts others in their place while a module works.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())

    def move(self, bank: str, placement: Placement) -> None:
        """The bank's experts have moved."""
        self.banks[bank] = placement
        for name, (shape, axes) in self.axes.items():
            if name.rpartition(".")[0] == bank:
                held = Axis(0, self.mesh.expert_group, placement.held)
                self.axes[name] = shape, (*axes[:-1], held)

    def placement(self, name: str) -> Placement | None:
        """Of a parameter that is dealt out by experts."""
        return self.banks.get(name.rpartition(".")[0])

    def whole(self, name: str, tensor: Tensor) -> Tensor | Piece:
        """A parameter, or a tensor like it, as a piece of the one of the whole model; shares its memory."""
        if name not in self.axes:
            return tensor
        shape, axes = self.axes[name]
        return Piece(shape, tensor, axes)

    def group(self, name: str) -> ProcessGroup | None:
        """Who else has the same piece of a parameter, and a part of its gradient; None: nobody."""
        cut = self.is_sliced(name)
        if isinstance(self.parameters[name], DTensor):  # FSDP has summed it over those with the same slices
            return None if cut or self.mesh.tensor_size == 1 else self.mesh.tensor_group
        return self.mesh.holders(self.placement(name) is not None, cut).get_group()

    def is_sliced(self, name: str) -> bool:
        """Whether the tensor axis cuts a parameter."""
        return name in self.axes and len(self.axes[name][1]) > (self.placement(name) is not None)

    def copies(self, name: str) -> int | Tensor:
        """How many processes hold the same of a parameter; of experts with replicas, [rows here]."""
        group, placement = self.group(name), self.placement(name)
        same = group.size() if group else 1
        if placement is None or not placement.replicated:
            return same
        piece = self.whole(name, self.parameters[name])
        assert isinstance(piece, Piece)
        return same * placement.copies[list(piece.experts)].to(piece.rows.device)


def _sliced(model: Decoder, layout: Layout) -> Iterable[tuple[str, int, tuple[tuple[int, ...], ...]]]:
    return sliced(model, layout.tp) if layout.tp > 1 else ()


def dealt(config: ModelConfig, layout: Layout) -> dict[str, Placement]:
    """The banks whose experts are dealt out, by name. Raises UserError when they cannot be, or there is none."""
    if layout.ep == 1:
        return {}
    given = dict(read_placements(Path(layout.placement))) if layout.placement else {}
    found: dict[str, Placement] = {}
    for depth, layer in enumerate(config.all_layers):
        if layer.moe:
            _check_layer(layer.moe, f"layer {depth}")
            entries = given.pop(f"layer_{depth:02d}", None)
            found |= _dealt_layer(layer.moe, depth, layout, entries)
    if not found:
        kinds = ", ".join(kind.model_fields["type"].default for kind in DEALT)
        raise UserError(f"an expert size of {layout.ep} does nothing: no layer has experts of type {kinds}")
    if given:
        raise UserError(f"{layout.placement}: the model has no experts in {', '.join(given)}")
    return found


def _dealt_layer(layer: MoEConfig, depth: int, layout: Layout, entries: list[Any] | None) -> dict[str, Placement]:
    where, found = f"layer {depth}", {}
    if entries is not None and len(entries) != layer.num_experts:
        raise UserError(f"{layout.placement}: {where} has {layer.num_experts} experts, not {len(entries)}")
    for number, (bank, span) in enumerate(zip(layer.experts, layer.spans, strict=True)):
        name, low, high = f"blocks.{depth}.moe.banks.{number}", span.start, span.stop
        if not isinstance(bank, DEALT):
            if entries is not None and any(entry is not None for entry in entries[low:high]):
                raise UserError(f"{layout.placement}: {where}: experts of type {bank.type} are everywhere: say null")
        elif entries is not None:
            found[name] = placed(entries[low:high], layout.ep, f"{layout.placement}: {where}")
        else:
            check_experts(bank.num_experts, layout.ep, where, layout.uneven)
            found[name] = Placement.in_order(bank.num_experts, layout.ep)
    return found


def _check_layer(layer: MoEConfig, name: str) -> None:
    gate, select = layer.router.gate, layer.router.select
    if hasattr(gate, "check_banks"):
        raise UserError(f"{name}: gate: {gate.type} asks all experts of a layer: it needs an expert size of 1")
    if select.type in ("soft", "merged"):
        raise UserError(f"{name}: select: {select.type} mixes before experts run: it needs an expert size of 1")


def _fully_shard(model: Decoder, banks: list[Bank], mesh: Mesh, wire: Wire, offload: bool) -> None:
    """Blocks and the root over all processes; dealt banks, each a group of its own, over those that hold the same.

    With slices, over those with the same slices: what the tensor axis does not cut, each tensor group cuts alike.
    ``offload``: to the host's memory, page-locked where a device copies from it; banks that nobody else holds too.
    """
    data, kept = mesh.grid["data"], set[nn.Parameter]()
    pinned = mesh.world.device_type != "cpu"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for bank in banks:
        if data.size() > 1 or offload:
            fully_shard(bank, mesh=data, offload_policy=policy)
        else:
            kept.update(bank.parameters())
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh.same_slice, ignored_params=kept, offload_policy=policy)
    # Such a view must not be changed in place, and the decoder adds it up out of place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each process' loss is its part of the sum over all, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(_Gather(wire))
            module.set_custom_reduce_scatter(_Scatter(wire))


class _Gather(DefaultAllGather):
    """FSDP's all-gather, counted."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Any:
        self.wire.gathers(input_tensor, group)
        return super().__call__(output_tensor, input_tensor, group, async_op)


class _Scatter(DefaultReduceScatter):
    """FSDP's reduce-scatter, counted."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self.wire.scatters(output_tensor, group)
        return super().__call__(output_tensor, input_tensor, group, op, async_op)
