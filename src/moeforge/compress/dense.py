"""Sparse to dense: what the experts of each layer know in one MLP, which a teacher then tunes (OneS, 2201.10890)."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from moeforge.compress.merge import merge
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.models import Decoder
from moeforge.models.config import LayerConfig
from moeforge.moe import MoE

How = Literal["mean", "units"]
"""``mean``: one expert, the mean of all by their shares, hidden units aligned. ``units``: of the hidden units of all
experts those that write most, as many as one expert has."""


@torch.no_grad()
def shares(model: Decoder, batches: Iterable[Batch]) -> dict[int, Tensor]:
    """By layer [E]: the combine weight that a token has for each expert on average, 0 for those it does not go to."""
    sums: dict[int, Tensor] = {}
    tokens = 0
    for batch in batches:
        output = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
        tokens += batch.input_ids.numel()
        for layer, routing in output.routings.items():
            route = routing.route
            here = sums.setdefault(layer, torch.zeros(len(route.ends)))
            here.index_add_(0, route.expert.long(), route.weight.float())
    return {layer: total / max(1, tokens) for layer, total in sums.items()}


@torch.no_grad()
def to_dense(model: Decoder, how: How, shares: Mapping[int, Tensor]) -> Decoder:
    """A decoder without experts that shares no memory with ``model``; a shared branch goes into the same MLP.

    Raises UserError for layers that are more than one stack of plain MLPs and a branch that is added to them.
    """
    config, layers = model.config, {}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".moe." not in name}
    for index, layer in enumerate(config.all_layers):
        if layer.moe is None:
            layers[index] = layer.replace(moe=None)
            continue
        _check(index, layer)
        up_GHD, down_DH = _gathered(model.moe_layers[index], how, shares[index])
        activation = layer.moe.experts[0].activation
        layers[index] = layer.replace(moe=None, d_ff=down_DH.shape[1], activation=activation, mlp_bias=False)
        tensors[f"blocks.{index}.mlp.gate_up_proj.weight"] = up_GHD.flatten(0, 1)
        tensors[f"blocks.{index}.mlp.down_proj.weight"] = down_DH
    if all(layer.moe is None for layer in config.all_layers):
        raise UserError("the model has no layer with experts: it is dense already")
    dense = Decoder(config.replace(moe=None, layers=layers, first_dense_layers=0, moe_every=1))
    dense.load_state_dict(tensors)
    return dense.to(model.embedding.weight).train(model.training)


def _check(index: int, layer: LayerConfig) -> None:
    moe = layer.moe
    assert moe is not None
    bank, *others = moe.experts
    plain = bank.type == "mlp" and not others and not (bank.bias or bank.clamp)
    whole = moe.heads == 1 and not (moe.token_block or moe.shortcut or moe.router.select.auxiliary)
    added = moe.shared is None or (
        moe.shared.mix.type == "sum" and not moe.shared.bias and moe.shared.activation == bank.activation
    )
    if not (plain and whole and added):
        raise UserError(f"layer {index}: only one stack of plain MLPs, and a branch added to it, go into one MLP")


def _gathered(moe: MoE, how: How, share_E: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and up [G, H, D] and down [D, H] of the layer's MLP, in the type of the experts."""
    bank, shared = moe.banks[0], moe.shared
    up, down = bank.gate_up_proj, bank.down_proj
    assert isinstance(up, Tensor) and isinstance(down, Tensor)
    d_expert = down.shape[2]
    if how == "mean":
        merged_up, merged_down = merge(up, down, share_E.tolist())
        up_GHD, down_DH = merged_up.unflatten(0, (-1, d_expert)), merged_down * share_E.sum().to(down.dtype)
    else:
        units_GND = up.unflatten(1, (-1, d_expert)).transpose(0, 1).flatten(1, 2)
        units_DN = (down * share_E[:, None, None].to(down.dtype)).transpose(0, 1).flatten(1, 2)
        strength_N = units_GND.float().norm(dim=-1).prod(0) * units_DN.float().norm(dim=0)
        kept = strength_N.argsort(descending=True, stable=True)[:d_expert].sort().values
        up_GHD, down_DH = units_GND[:, kept], units_DN[:, kept]
    if shared is not None:
        beside = shared.mlp.gate_up_proj.weight.unflatten(0, (len(up_GHD), -1))
        up_GHD = torch.cat([up_GHD, beside], 1)
        down_DH = torch.cat([down_DH, shared.mlp.down_proj.weight], 1)
    return up_GHD, down_DH
