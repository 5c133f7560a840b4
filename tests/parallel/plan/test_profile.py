"""Fits find again what made the numbers; a profile of two real processes is a cluster that plans."""

import os

import pytest
import torch
from torch import distributed as dist

from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.plan import profile as profiling
from moeforge.parallel.plan.cluster import read_cluster
from moeforge.parallel.plan.job import Arrangement, Job
from moeforge.parallel.plan.profile import fit, fit_device, profile
from moeforge.parallel.plan.simulate import play, step_seconds
from moeforge.parallel.plan.step import step_of
from moeforge.parallel.together import Together
from tests.parallel.plan.test_simulate import CLUSTER, model


def test_latency_and_bandwidth_are_found_again():
    rows = [(3, size, 3 * 2e-5 + size / 5e8) for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22)]
    latency, per_byte = fit(rows)
    assert (latency, 1 / per_byte) == (pytest.approx(2e-5), pytest.approx(5e8))


@pytest.mark.parametrize("seconds", [[1e-3, 1e-3, 0.5e-3], [1e-5, 4e-3, 20e-3]])
def test_noise_makes_nothing_negative(seconds):
    assert min(fit([(1, 1000 * 8**power, took) for power, took in enumerate(seconds)])) > 0


def test_a_device_is_found_again():
    true = CLUSTER.replace(flops=5e10, bandwidth=2e10, overhead=2e-5, half_width=100.0)
    jobs = [
        Job(model(d_model=width, num_heads=2), rows, 64) for width, rows in ((32, 1), (32, 32), (256, 1), (256, 32))
    ]
    measured = [(job, step_seconds(play(step_of(job, Arrangement(1)), Arrangement(1), true))) for job in jobs]
    found, error = fit_device(measured, (2e11, 4e10, 2e-6))
    assert error < 0.03
    assert found[2] == pytest.approx(2e-5, rel=0.15)


def profile_here(path) -> None:
    """With few and small things to measure."""
    profiling.SIZES, profiling.ROUNDS, profiling.WIDTH, profiling.VECTOR = (1 << 10, 1 << 16), 1, 64, 1 << 12
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    ranks = Together(Mesh.build(dist.get_world_size(), 1, "cpu"), Layout())
    profile(ranks, path, torch.float32, [(Job(model(), 1, 16), 1.0), (Job(model(), 8, 16), 2.0)])


@pytest.mark.dist
def test_two_processes_write_a_cluster(processes, tmp_path):
    path = tmp_path / "here.yaml"
    processes(2).run(profile_here, path)
    cluster = read_cluster(path)
    assert (cluster.nodes, cluster.devices_per_node, cluster.between) == (1, 2, None)
    assert set(cluster.inside.kinds) == {"all_to_all", "all_reduce", "all_gather", "reduce_scatter"}
    assert step_seconds(play(step_of(Job(model(), 2, 16), Arrangement(2, 2)), Arrangement(2, 2), cluster)) > 0
