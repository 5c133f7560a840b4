"""Offload: all that FSDP cuts is told to stay on the host, experts that nobody else holds too.

That results stay the same is in test_training, test_rebalance and test_runs, on tensors that are on the host anyway.
"""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.evaluate import bits_per_byte
from moeforge.parallel import sharding, together
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from tests.parallel.test_training import batches, decoder


def policies(layout: Layout) -> list[tuple[str, bool]]:
    """Of every module that FSDP has: what it was told of the host, and whether all parameters are its own."""
    told = []

    def noted(module, **options):
        told.append((type(options["offload_policy"]).__name__, options["offload_policy"]))
        return fully_shard(module, **options)

    ranks = together.Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu", None, layout.tp), layout)
    model = decoder("plain", torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "fully_shard", noted)
        ranks.place(model)
    assert all(isinstance(p, DTensor) for p in model.parameters()) == layout.offload
    return [(name, getattr(policy, "pin_memory", None)) for name, policy in told]


@pytest.mark.dist
def test_everything_is_told_to_stay_on_the_host(processes):
    for told in processes(2).run(policies, Layout(2, shard=True, offload=True)):
        assert told == [(CPUOffloadPolicy.__name__, False)] * 4  # a bank, two blocks, the root
    for told in processes(2).run(policies, Layout(2, shard=True)):
        assert told == [("OffloadPolicy", None)] * 3


def test_it_would_do_nothing_on_the_cpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    layout = Layout(shard=True, offload=True)
    layout.check_device("cuda")
    with pytest.raises(UserError, match="--offload: the model is on the CPU already"), together.join(layout):
        pass


def test_a_batch_goes_where_a_model_computes(monkeypatch):
    seen = []
    monkeypatch.setattr(Batch, "to", lambda batch, device: seen.append(device.type) or batch)
    bits_per_byte(decoder("plain", torch.float64), batches([1], 0), device=torch.device("xpu"))
    assert seen == ["xpu"]
