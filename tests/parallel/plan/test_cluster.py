"""Cluster files: amounts with their units, and every mistake named."""

import re

import pytest

from moeforge.errors import UserError
from moeforge.parallel.plan.cluster import read_cluster

GOOD = """
nodes: 2
devices_per_node: 8
memory: 80 GB
flops: 400 TFLOP/s
bandwidth: 3.35e12
overhead: 5 us
inside: {latency: 4us, bandwidth: 450 GB/s, kinds: {all_to_all: {latency: 10 us, bandwidth: 300 GB/s}}}
between: {latency: 0.00001, bandwidth: 50 GB/s}
"""


def test_amounts_have_units_or_none(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD)
    cluster = read_cluster(path)
    assert (cluster.size, cluster.memory, cluster.flops, cluster.bandwidth) == (16, 80e9, 400e12, 3.35e12)
    assert cluster.overhead == pytest.approx(5e-6)
    assert cluster.inside.line("all_to_all").bandwidth == 300e9
    assert cluster.inside.line("all_reduce").bandwidth == 450e9


@pytest.mark.parametrize(
    "change, said",
    [
        (("80 GB", "80 pounds"), "memory: '80 pounds' is no amount like 5e9 or 5 GB"),
        (("80 GB", "-5"), "memory = -5: input should be greater than"),
        (("80 GB", ".inf"), "memory"),
        (("nodes: 2", "nodes: 0"), "nodes = 0: input should be greater than or equal to 1"),
        (("inside", "insid"), "insid is not a setting. Did you mean 'inside'?"),
        (("5 us", "-1"), "overhead"),
        (("all_to_all", "broadcast"), "broadcast"),
        (("between:", "name: x #"), "nodes = 2, and between, the link from node to node, is missing"),
    ],
)
def test_nonsense_is_named(tmp_path, change, said):
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UserError, match=re.escape(said)):
        read_cluster(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        read_cluster(tmp_path / "none.yaml")
