"""Gradients over the mesh: summed where several processes have a part of them, and their one global norm."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from moeforge.parallel.piece import Piece, local
from moeforge.parallel.sharding import Sharding
from moeforge.parallel.wire import Wire

BUCKET_BYTES = 64 << 20
"""Gradients travel together up to this size: one message costs as much as many bytes."""


@torch.no_grad()
def sum_gradients(sharding: Sharding, wire: Wire) -> None:
    """Sums each gradient over the processes that hold the same parameter. Collective."""
    together: dict[ProcessGroup, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in sharding.parameters.items():
        group = sharding.group(name)
        if group is not None and group.size() > 1:
            together[group].append(parameter)
    for group, parameters in together.items():
        for bucket in buckets(parameters):
            _sum_bucket(bucket, group, wire)
    _sum_replicas(sharding, wire)


def _sum_replicas(sharding: Sharding, wire: Wire) -> None:
    """Experts that several processes of an expert group hold: one buffer per parameter, zero where they are not.

    One number goes along: how many processes have a gradient.
    """
    for name, parameter in sharding.parameters.items():
        placement = sharding.placement(name)
        if placement is None or not (replicated := placement.replicated):
            continue
        # FSDP leaves each row on one process of its data group, else all of them have the same.
        mesh = sharding.mesh
        group = mesh.same_slice.get_group() if isinstance(parameter, DTensor) else mesh.expert_group
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        piece = sharding.whole(name, gradient)
        assert isinstance(piece, Piece)
        here = {expert: row for row, expert in enumerate(piece.experts) if expert in replicated}
        rows, at = list(here.values()), [replicated.index(expert) for expert in here]
        flat = piece.rows.new_zeros(1 + len(replicated) * parameter.shape[1:].numel())
        buffer = flat[1:].view(-1, *parameter.shape[1:])
        flat[0], buffer[at] = float(parameter.grad is not None), piece.rows[rows]
        wire.all_reduce(flat, group)
        if flat[0]:
            piece.rows[rows] = buffer[at]
            parameter.grad = gradient


def buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """In order, each of one type and at most ``BUCKET_BYTES``, but for a parameter that is larger by itself."""
    buckets: list[list[nn.Parameter]] = []
    room, dtype = 0, None
    for parameter in parameters:
        if parameter.nbytes > room or parameter.dtype != dtype:
            buckets.append([])
            room, dtype = BUCKET_BYTES, parameter.dtype
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


def _sum_bucket(parameters: list[nn.Parameter], group: ProcessGroup, wire: Wire) -> None:
    """One number per parameter goes along: how many processes have a gradient. Where none has, there stays none."""
    here = [local(p) for p in parameters]
    present = here[0].new_tensor([p.grad is not None for p in parameters], dtype=here[0].dtype)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present, *(local(gradient).flatten() for gradient in gradients)])
    wire.all_reduce(flat, group)
    present, summed = flat[: len(parameters)], flat[len(parameters) :].split([h.numel() for h in here])
    for parameter, gradient, values, holders in zip(parameters, gradients, summed, present.tolist(), strict=True):
        if holders:
            local(gradient).copy_(values.view_as(local(gradient)))
            parameter.grad = gradient


@torch.no_grad()
def clip_gradients(sharding: Sharding, wire: Wire, max_norm: float) -> Tensor:
    """Scales all gradients so that their norm over the mesh is at most ``max_norm``; returns it as it was. Collective.

    Every process adds up the squares of what it holds, divided by how many hold the same.
    """
    gradients: list[Tensor] = []
    square = torch.zeros((), dtype=torch.float64, device=next(iter(sharding.parameters.values())).device)
    for name, parameter in sharding.parameters.items():
        if parameter.grad is not None:
            gradients.append(local(parameter.grad))
            copies = sharding.copies(name)
            if isinstance(copies, int):
                square += torch.linalg.vector_norm(gradients[-1]).double().square() / copies
            else:
                square += (torch.linalg.vector_norm(gradients[-1].flatten(1), dim=1).double().square() / copies).sum()
    wire.all_reduce(square, sharding.mesh.world_group)
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm
