"""Where each parameter lives: experts dealt out over the expert axis, the rest on every process or cut by FSDP."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, Replicate, Shard

from moeforge.errors import UserError
from moeforge.models import Decoder, ModelConfig
from moeforge.moe import MoEConfig
from moeforge.moe.bank import Bank, LowRankExperts, MLPExperts, NeuronExperts
from moeforge.parallel.exchange import Exchange
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh, check_experts
from moeforge.parallel.wire import Wire

DEALT = (MLPExperts, LowRankExperts, NeuronExperts)
"""Banks whose experts own all their weights. Others are shared, or too cheap for their rows to travel: everywhere."""


class Sharding:
    """A decoder's parameters on a mesh. The model is changed in place; each process must hold the same one before."""

    def __init__(self, model: Decoder, mesh: Mesh, exchange: Exchange, layout: Layout) -> None:
        """Raises UserError where ``dealt`` does."""
        self.mesh = mesh
        banks: dict[str, Bank] = {name: model.get_submodule(name) for name in dealt(model.config, mesh.expert_size)}  # type: ignore[misc]
        self.dealt: dict[str, torch.Size] = {}
        """Whole shape of each parameter that is dealt out by experts."""
        for name, bank in banks.items():
            for key, parameter in list(bank.named_parameters(recurse=False)):
                self.dealt[f"{name}.{key}"] = parameter.shape
                own = parameter.detach().chunk(mesh.expert_size)[mesh.grid.get_local_rank("expert")]
                setattr(bank, key, nn.Parameter(own.clone()))
            exchange.install(bank)
        if layout.shard:
            _fully_shard(model, list(banks.values()), mesh, exchange.wire)
        # Kept, as FSDP puts others in their place while a module works.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter, or a tensor like it, as a piece of the one of the whole model; shares its memory."""
        if name not in self.dealt:
            return tensor
        shape, local = self.dealt[name], tensor.to_local() if isinstance(tensor, DTensor) else tensor
        placements = Shard(0), Shard(0) if isinstance(tensor, DTensor) else Replicate()
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local.detach(), self.mesh.grid, placements, run_check=False, shape=shape, stride=stride
        )

    def group(self, name: str) -> ProcessGroup | None:
        """Who else has the same piece of a parameter, and a part of its gradient; None: FSDP has summed it already."""
        if isinstance(self.parameters[name], DTensor):
            return None
        return self.mesh.data_group if name in self.dealt else self.mesh.world_group


def dealt(config: ModelConfig, expert_size: int) -> list[str]:
    """Names of the banks whose experts are dealt out. Raises UserError when they cannot be, or there is none."""
    if expert_size == 1:
        return []
    names: list[str] = []
    for depth, layer in enumerate(config.all_layers):
        if layer.moe:
            _check_layer(layer.moe, f"layer {depth}")
            for number, bank in enumerate(layer.moe.experts):
                if isinstance(bank, DEALT):
                    check_experts(bank.num_experts, expert_size, f"layer {depth}")
                    names.append(f"blocks.{depth}.moe.banks.{number}")
    if not names:
        kinds = ", ".join(kind.model_fields["type"].default for kind in DEALT)
        raise UserError(f"an expert size of {expert_size} does nothing: no layer has experts of type {kinds}")
    return names


def _check_layer(layer: MoEConfig, name: str) -> None:
    gate, select = layer.router.gate, layer.router.select
    if hasattr(gate, "check_banks"):
        raise UserError(f"{name}: gate: {gate.type} asks all experts of a layer: it needs an expert size of 1")
    if select.type in ("soft", "merged"):
        raise UserError(f"{name}: select: {select.type} mixes before experts run: it needs an expert size of 1")


def _fully_shard(model: Decoder, banks: list[Bank], mesh: Mesh, wire: Wire) -> None:
    """Blocks and the root over all processes; dealt banks, each a group of its own, over those that hold the same."""
    data, kept = mesh.grid["data"], set[nn.Parameter]()
    for bank in banks:
        if data.size() > 1:
            fully_shard(bank, mesh=data)
        else:
            kept.update(bank.parameters())
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh.world, ignored_params=kept)
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
