"""The mesh: the fastest of all that fit, and what to say when none does."""

import re
from dataclasses import replace
from itertools import product

import pytest

from moeforge.errors import UserError
from moeforge.parallel.plan.amounts import Work
from moeforge.parallel.plan.job import Arrangement, Job
from moeforge.parallel.plan.memory import memory_of
from moeforge.parallel.plan.search import Wanted, arrangements, candidate, search
from tests.parallel.plan.test_simulate import CLUSTER, model

JOB = Job(model(), 16, 64)


def test_all_meshes_are_tried_and_the_fastest_that_fits_is_first():
    cluster = CLUSTER.replace(memory=1.5e6)
    tried = [
        candidate(JOB, Arrangement(8, expert, shard, again), cluster)
        for expert, shard, again in product((1, 2, 4, 8), (False, True), (False, True))
    ]
    fitting = [each for each in tried if each.memory.total <= cluster.memory]
    assert 0 < len(fitting) < len(tried)
    found = search(JOB, cluster, Wanted())
    assert {each.arrangement for each in found} == {each.arrangement for each in fitting}
    assert found[0].seconds == min(each.seconds for each in fitting)


def test_what_is_wanted_is_kept():
    found = search(JOB, CLUSTER, Wanted(expert=2, shard=True, recompute=True, chunks=(4,)))
    assert [each.arrangement for each in found] == [Arrangement(8, 2, True, True, 4)]


def test_pieces_are_chosen_as_brute_force_would():
    cluster = CLUSTER.replace(overhead=2e-4)
    found = search(JOB, cluster, Wanted(expert=4, shard=False, recompute=False, chunks=(1, 2, 4, 8)))
    tried = {chunks: candidate(JOB, Arrangement(8, 4, chunks=chunks), cluster).seconds for chunks in (1, 2, 4, 8)}
    assert found[0].arrangement.chunks == min(tried, key=tried.__getitem__)
    assert [each.seconds for each in found] == sorted(tried.values())


def test_no_mesh_fits_and_the_smallest_cluster_that_would_is_named():
    small = CLUSTER.replace(memory=5.5e5)
    with pytest.raises(UserError, match="fits on no mesh of 8 devices") as caught:
        search(JOB, small, Wanted())
    (nodes,) = map(int, re.findall(r"would fit on (\d+) nodes of 4", str(caught.value)))
    assert search(JOB, small.replace(nodes=nodes), Wanted())
    with pytest.raises(UserError):
        search(JOB, small.replace(nodes=nodes - 1), Wanted())


def test_activations_of_one_row_that_are_too_large_need_other_devices():
    with pytest.raises(UserError, match="More nodes do not help"):
        search(JOB, CLUSTER.replace(memory=1e4), Wanted())


@pytest.mark.parametrize(
    "expert, said",
    [(3, "8 processes cannot form expert groups of 3: take an expert size of 1, 2, 4 or 8"), (8, "6 experts cannot")],
)
def test_a_mesh_that_cannot_be_is_refused(expert, said):
    job = Job(model(moe={"experts": {"num_experts": 6, "d_expert": 32}}), 16, 64)
    with pytest.raises(UserError, match=said):
        search(job, CLUSTER, Wanted(expert=expert))


def test_experts_that_cannot_be_dealt_out_stay_where_they_are():
    job = Job(model(moe={"experts": {"num_experts": 6, "d_expert": 32}}), 16, 64)
    assert {arrangement.expert for arrangement in arrangements(job, CLUSTER, Wanted())} == {1, 2}


def test_sharding_and_dealing_hold_less():
    plain, dealt, cut = (
        memory_of(JOB, arrangement) for arrangement in (Arrangement(8), Arrangement(8, 8), Arrangement(8, 1, True))
    )
    assert cut.parameters < dealt.parameters < plain.parameters
    assert plain.optimizer == 2 * plain.parameters == 2 * plain.gradients
    assert memory_of(JOB, Arrangement(8, recompute=True)).activations < plain.activations


def test_what_is_offloaded_is_on_the_host_and_takes_its_time():
    asked = Wanted(expert=8, like=Arrangement(1, offload=True))
    with pytest.raises(UserError, match="cluster says nothing of the way to the host: give it"):
        search(JOB, CLUSTER, asked)
    cluster = CLUSTER.replace(host=1e7)
    here = memory_of(JOB, Arrangement(8, 8, True))
    for found in search(JOB, cluster, asked):
        there, arrangement = found.memory, found.arrangement
        assert arrangement.shard and arrangement.offload
        assert (there.parameters, there.gradients, there.optimizer) == (0, 0, 0)
        assert there.host == 4 * here.parameters
        assert there.total == there.activations + there.buffers
        # Weights forward and back, the root's but once; gradients; the norm reads them; the update: 9 times as much.
        works = [(part.times, operation.does) for part in found.parts for operation in part.operations]
        moved = sum(float(times * work.hosted.max()) for times, work in works if isinstance(work, Work))
        root = sum(p.nbytes for name, p in JOB.decoder.named_parameters() if not name.startswith("blocks")) / 8
        assert moved == 13 * here.parameters - root
        stays = candidate(JOB, replace(arrangement, offload=False), cluster)
        assert found.seconds - stays.seconds > 0.9 * moved / cluster.host
