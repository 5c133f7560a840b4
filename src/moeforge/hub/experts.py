"""``experts``: the same picture of the experts of any model, ours or one of transformers, for every verb to work on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.hub.bridge import names_on_disk, why_not
from moeforge.hub.interface import is_experts, layer_of
from moeforge.hub.layout import plan
from moeforge.hub.pretrained import Pretrained
from moeforge.kernels.activation import is_gated
from moeforge.models import Decoder
from moeforge.models.weights import check_whole
from moeforge.moe import MoE
from moeforge.moe.bank.mlp import MLPBank

ROUTERS = ("router", "gate")
SHARED = ("shared_experts", "shared_expert", "shared_mlp", "mlp")
"""Names of siblings of the experts. ``mlp`` beside experts is a dense branch that every token takes."""


@dataclass(frozen=True)
class Stack:
    """E same-shaped experts. Matrices and biases are views without gradient: what is written into them is written into
    the model. Where the experts are no MLPs with matrices of their own (``kind`` says what they are), all are None."""

    kind: str
    """``mlp``, or the type of our bank."""
    module: nn.Module
    """What computes them: its activation, limits and norms are its own."""
    num_experts: int
    gate: Tensor | None = None
    """[E, H, D]; None where nothing is gated."""
    up: Tensor | None = None
    """[E, H, D]."""
    down: Tensor | None = None
    """[E, D, H]."""
    gate_bias: Tensor | None = None
    """[E, H]."""
    up_bias: Tensor | None = None
    """[E, H]."""
    down_bias: Tensor | None = None
    """[E, D]."""
    on_disk: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of each parameter in the model -> the tensors of a checkpoint that it is joined from; none where these hold
    another stack's experts too."""


@dataclass(frozen=True)
class LayerExperts:
    """One router and what it routes to."""

    name: str
    """Dotted name of the module that holds router and experts."""
    layer: int
    """Number of the decoder layer."""
    router: nn.Module
    stacks: tuple[Stack, ...]
    """The router numbers their experts in order."""
    shared: nn.Module | None
    """The branch that every token takes."""

    @property
    def num_experts(self) -> int:
        """Experts of all stacks together."""
        return sum(stack.num_experts for stack in self.stacks)


def experts(model: nn.Module) -> list[LayerExperts]:
    """The layers with experts, in order. Raises UserError, with the reason, where none can be found."""
    inside = getattr(model, "decoder", None)  # in what AutoModelForCausalLM opens
    ours, prefix = (inside, "decoder.") if isinstance(inside, Decoder) else (model, "")
    found = [*(_ours(ours, prefix) if isinstance(ours, Decoder) else _theirs(model))]
    if not found:
        raise UserError("this model has no layer with experts" if isinstance(ours, Decoder) else why_not(model))
    return found


def _ours(model: Decoder, prefix: str) -> Iterator[LayerExperts]:
    names = model.origin.family.names if isinstance(model, Pretrained) else None
    held: dict[str, tuple[str, ...]] = {}
    for piece in plan(model, names):
        parameter = prefix + piece.parameter
        held[parameter] = (*held.get(parameter, ()), piece.name)
    for layer, moe in model.moe_layers.items():
        if layer >= len(model.blocks):  # the same blocks, passed again
            break
        name = f"{prefix}blocks.{layer}.moe"
        yield LayerExperts(name, layer, moe.router, tuple(_banks(moe, name, held)), moe.shared)


def _banks(moe: MoE, name: str, held: dict[str, tuple[str, ...]]) -> Iterator[Stack]:
    for index, (config, bank) in enumerate(zip(moe.config.experts, moe.banks, strict=True)):
        names = [f"{name}.banks.{index}.{parameter}" for parameter, _ in bank.named_parameters()]
        on_disk = {parameter: held[parameter] for parameter in names}
        matrices: dict[str, Tensor | None] = {}
        if isinstance(bank, MLPBank):
            check_whole(bank)
            gate, up = _halves(bank.gate_up_proj.detach(), bank.config.activation)
            matrices = {"gate": gate, "up": up, "down": bank.down_proj.detach()}
            if bank.gate_up_bias is not None and bank.down_bias is not None:
                gate_bias, up_bias = _halves(bank.gate_up_bias.detach(), bank.config.activation)
                matrices |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": bank.down_bias.detach()}
        yield Stack(config.type, bank, config.num_experts, on_disk=on_disk, **matrices)


def _halves(joined: Tensor, activation: Activation) -> tuple[Tensor | None, Tensor]:
    """(gate, up) of one of our tensors [E, 2H, ...] or, where nothing is gated, (None, up) of [E, H, ...]."""
    gate, up = joined.chunk(2, dim=1) if is_gated(activation) else (None, joined)
    return gate, up


def _theirs(model: nn.Module) -> Iterator[LayerExperts]:
    modules: Iterator[tuple[str, Any]] = model.named_modules()
    for name, module in modules:
        if is_experts(module):
            holder = name.rpartition(".")[0]
            router = _sibling(model, name, ROUTERS, 1)
            number = layer_of(name)
            if router is None or number is None:
                raise UserError(f"{name}: no {' or '.join(ROUTERS)} beside it, or no layer's number in its name")
            names = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
            on_disk = {parameter: names_on_disk(model, parameter) for parameter in names}
            stack = Stack("mlp", module, module.num_experts, on_disk=on_disk, **_matrices(module))
            yield LayerExperts(holder, number, router, (stack,), _sibling(model, name, SHARED, 2))


def _sibling(model: nn.Module, name: str, wanted: tuple[str, ...], levels: int) -> nn.Module | None:
    """The first child so named of the module that holds ``name``, or of the next one up; not one on the way to it."""
    for _ in range(levels):
        above, _, inner = name.rpartition(".")
        children = dict(model.get_submodule(above).named_children())
        found = [children[child] for child in wanted if child in children and child != inner]
        if found:
            return found[0]
        name = above
    return None


def _matrices(module: Any) -> dict[str, Tensor | None]:
    """Gate, up and down apart and the output dimension first, however the family stores them."""
    if not isinstance(module.down_proj, Tensor):
        raise UserError("experts are held in few bits: start from the model that this was made of")
    up = (module.gate_up_proj if module.has_gate else module.up_proj).detach()
    down, biases = module.down_proj.detach(), {}
    up, down = (up.transpose(1, 2), down.transpose(1, 2)) if module.is_transposed else (up, down)
    gate, up = _apart(module, up)
    if module.has_bias:
        bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias).detach()
        gate_bias, up_bias = _apart(module, bias)
        biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": module.down_proj_bias.detach()}
    return {"gate": gate, "up": up, "down": down, **biases}


def _apart(module: Any, joined: Tensor) -> tuple[Tensor | None, Tensor]:
    """(gate, up) of a tensor [E, 2H, ...] or, where nothing is gated, (None, up) of [E, H, ...]."""
    if not module.has_gate:
        return None, joined
    gate, up = joined.chunk(2, dim=1) if module.is_concatenated else (joined[:, ::2], joined[:, 1::2])
    return gate, up
