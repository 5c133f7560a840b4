"""What plans say about figures that others published, on clusters as we suppose theirs were.

Every supposition stands here as a number. ``python benchmarks/plan_published.py`` writes ``plan_published.json``.
"""

import random
from itertools import product
from statistics import median, quantiles
from typing import Any

from report import write

from moeforge.config import build
from moeforge.models import ModelConfig
from moeforge.parallel.plan.cluster import Cluster
from moeforge.parallel.plan.job import Arrangement, Job
from moeforge.parallel.plan.messages import Message
from moeforge.parallel.plan.search import Wanted, candidate, describe, search
from moeforge.parallel.plan.simulate import Played, busy_seconds, play
from moeforge.parallel.plan.step import step_of


def model(**settings: Any) -> ModelConfig:
    """A decoder with plain MLPs four times as wide as the stream, unless ``settings`` say otherwise."""
    return build(ModelConfig, {"activation": "gelu", "d_ff": 4 * settings["d_model"], "max_seq_len": 2048, **settings})


def experts(count: int, width: int, top_k: int, **settings: Any) -> dict[str, Any]:
    """The settings of a layer with experts."""
    bank = {"num_experts": count, "d_expert": width, "activation": settings.pop("activation", "gelu")}
    return {"experts": bank, "router": {"select": {"k": top_k}}, **settings}


A100 = {
    "memory": 40e9,
    "flops": 250e12,
    "half_width": 128,
    "bandwidth": 1.4e12,
    "overhead": 5e-6,
    "inside": {"latency": 5e-6, "bandwidth": 230e9},
    "between": {"latency": 15e-6, "bandwidth": 20e9},
}
"""80 % of 312 TFLOP/s; NVLink at 300 and InfiniBand at 25 GB/s for each device, and three quarters of them reached."""


LARGE = model(vocab_size=51200, d_model=4096, num_layers=32, num_heads=32)
SPARSE = model(vocab_size=51200, d_model=2048, num_layers=24, num_heads=16, moe_every=2, moe=experts(128, 8192, 1))


def against_dense() -> dict[str, Any]:
    """arXiv:2201.05596, section 3.3, and deepspeed.ai's page on MoE for NLG: samples/s on 128 A100, 70 and 372.

    Once with the cluster as supposed, once with the FLOP/s at which the dense model comes to its 70.
    """
    low, high = 1e12, A100["flops"]
    for _ in range(20):
        middle = (low + high) / 2  # type: ignore[operator]
        low, high = (middle, high) if rate(LARGE, 1024, middle)[0] < 70 else (low, middle)
    found = {}
    for name, flops in (("as supposed", A100["flops"]), ("dense as published", low)):
        dense, sparse = rate(LARGE, 1024, flops), rate(SPARSE, 512, flops)
        told = {"tflops": flops / 1e12, "6.7B": dense, "1.3B+MoE-128": sparse, "gain": sparse[0] / dense[0]}  # type: ignore[operator]
        found[name] = told
    return {**found, "published": {"6.7B": 70, "1.3B+MoE-128": 372, "gain": 372 / 70}}


def rate(config: ModelConfig, batch: int, flops: object) -> tuple[float, str]:
    """Samples per second on 16 nodes of 8, and the mesh."""
    cluster = build(Cluster, {"nodes": 16, "devices_per_node": 8, **A100, "flops": flops})
    best = search(Job(config, batch, 2048), cluster, Wanted())[0]
    return batch / best.seconds, describe(best.arrangement)


def share_of_sending(played: list[Played]) -> float:
    """Of the time of routers, exchanges and experts, without the branch beside them."""
    sent, all_of_it = 0.0, 0.0
    for event in (event for each in played for event in each.events):
        if event.operation.name.split()[0] in ("router", "counts", "dispatch", "experts", "combine"):
            took = float((event.end - event.start).max())
            all_of_it += took
            sent += took * isinstance(event.operation.does, Message)
    return sent / all_of_it


def shortcut(share: float) -> dict[str, float]:
    """arXiv:2404.05019v1: top-1 with a shortcut and a shared expert, over top-2 where sending is ``share`` of the
    experts' time; 8 devices, 24 layers of width 1024, experts in every other one, 8 sequences of 1024 each."""
    shape = {"vocab_size": 50257, "d_model": 1024, "num_layers": 24, "num_heads": 16, "moe_every": 2}
    plain = model(**shape, moe=experts(8, 4096, 2))
    beside = {"shared": {"d_expert": 4096, "activation": "gelu"}, "shortcut": True}
    early = model(**shape, moe=experts(8, 4096, 1, **beside))
    arrangement, low, high = Arrangement(8, 8), 1e8, 1e13
    device = {"memory": 24e9, "flops": 120e12, "half_width": 128, "bandwidth": 0.8e12, "overhead": 5e-6}

    def played(config: ModelConfig, bandwidth: float, overlap: bool) -> list[Played]:
        link = {"latency": 1e-5, "bandwidth": bandwidth}
        cluster = build(Cluster, {"nodes": 1, "devices_per_node": 8, "inside": link, "overlap": overlap, **device})
        return play(step_of(Job(config, 64, 1024), arrangement), arrangement, cluster)[:1]

    for _ in range(50):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if share_of_sending(played(plain, middle, False)) > share else (low, middle)
    before = played(plain, low, False)[0].seconds
    after, apart = (played(early, low, overlap)[0].seconds for overlap in (True, False))
    hidden = (apart - after) / busy_seconds(played(early, low, False))[1]
    return {"link_GB_per_s": low / 1e9, "speedup": before / after, "hidden_share_of_sending": hidden}


TESTBEDS = {
    "48 RTX A6000": (6, 8, 110e12, 0.65e12, 20e9, 2.5e9),
    "32 RTX 2080 Ti": (8, 4, 45e12, 0.5e12, 10e9, 2.5e9),
}
"""Nodes, devices of each, FLOP/s, bytes/s of memory, inside and between: PCIe, and shares of 200 and 100 Gbit/s."""
GRID = list(
    product(
        (1, 2, 4), (512, 1024, 2048), (1024, 2048, 4096), (2, 3, 4), (8, 16, 32), (1.2, 2.4, 1.0), ("gelu", "swiglu")
    )
)
"""Sequences per device, their length, width, experts' width over it, heads, rows over the mean, kind: 1458 layers. The
numbers of values are the paper's, the values our guess."""
SAMPLE = 162


def layers(testbed: str) -> dict[str, Any]:
    """arXiv:2501.10714, section 6.3: what there is to gain over exchanges in one piece, and in the best of 1 to 8."""
    nodes, devices, flops, memory, near, far = TESTBEDS[testbed]
    links = {"inside": {"latency": 1e-5, "bandwidth": near}, "between": {"latency": 3e-5, "bandwidth": far}}
    device = {"memory": 1e12, "flops": flops, "half_width": 128, "bandwidth": memory, "overhead": 5e-6}
    cluster = build(Cluster, {"nodes": nodes, "devices_per_node": devices, **device, **links})
    count, gains, bounds, chosen = nodes * devices, [], [], []
    for batch, length, width, factor, heads, capacity, kind in random.Random(0).sample(GRID, SAMPLE):
        moe = experts(count, factor * width, 2, activation=kind)
        layer = model(vocab_size=2, d_model=width, num_layers=1, num_heads=heads, moe=moe)
        job = Job(layer, max(1, round(batch * capacity)) * count, length)
        apart = candidate(job, Arrangement(count, count), cluster.replace(overlap=False)).seconds
        tried = {chunks: candidate(job, Arrangement(count, count, chunks=chunks), cluster) for chunks in (1, 2, 4, 8)}
        best = min(tried, key=lambda chunks: tried[chunks].seconds)
        chosen.append(best)
        gains.append(apart / tried[best].seconds)
        bounds.append(tried[best].seconds / max(busy_seconds(tried[best].played)))
    return {
        "chunks_over_none": {"median": median(gains), "quartiles": quantiles(gains)[::2]},
        "room_beyond_chunks": {"median": median(bounds), "quartiles": quantiles(bounds)[::2]},
        "chunks": {str(number): chosen.count(number) for number in sorted(set(chosen))},
    }


def main() -> None:
    """All three."""
    found = {
        "dense against experts": against_dense(),
        "shortcut": {f"{share:.0%} sending": shortcut(share) for share in (0.6, 0.15)},
        "layers": {testbed: layers(testbed) for testbed in TESTBEDS},
    }
    write("plan_published", found)


if __name__ == "__main__":
    main()
