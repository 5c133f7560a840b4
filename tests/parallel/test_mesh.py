"""Who works with whom, told apart one by one: in a world that is only imagined, of one process after the other."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moeforge.parallel.mesh import Mesh


def groups(rank: int, size: int, ep: int, tp: int, node_size: int) -> dict[str, list[int]]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        mesh = Mesh.build(size, ep, "cpu", node_size, tp)
        inside, across = mesh.levels
        found = {
            "tensor": mesh.tensor_group,
            "expert": mesh.expert_group,
            "inside": inside,
            "across": across,
            "same slice": mesh.same_slice.get_group(),
        }
        places = mesh.same_slice.get_coordinate(), mesh.grid["data"].get_coordinate()
        assert places == ((found["same slice"].rank(),), (mesh.grid["data"].get_group().rank(),))  # as FSDP cuts
        return {name: dist.get_process_group_ranks(group) for name, group in found.items()}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size, ep, tp, node_size", [(8, 4, 1, 2), (8, 4, 2, 4), (16, 4, 2, 4), (16, 8, 2, 8)], ids=str)
def test_groups_are_those_with_the_same_coordinates(size, ep, tp, node_size):
    for rank in range(size):
        found = groups(rank, size, ep, tp, node_size)

        def others(*same, here=rank):
            return [other for other in range(size) if all(of(other) == of(here) for of in same)]

        def slice_(r):
            return r % tp

        def team(r):
            return r // (tp * ep)

        def machine(r):
            return r // node_size

        def place(r):
            return r % node_size

        assert found["tensor"] == others(lambda r: r // tp)
        assert found["expert"] == others(slice_, team)
        assert found["inside"] == others(slice_, team, machine)
        assert found["across"] == others(slice_, team, place)
        assert found["same slice"] == others(slice_)
