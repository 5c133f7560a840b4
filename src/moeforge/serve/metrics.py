"""Metrics for Prometheus: how long requests take, what the engine holds, and how evenly experts are used.

Which experts a text takes says what the text is about, so only sums over all requests are here.
"""

from collections.abc import Iterator
from math import log

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from moeforge.generate import End, Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self, engine: Engine, machine_gb_s: float | None = None) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine, machine_gb_s))

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"moeforge_{name}_seconds", what, buckets=SECONDS, registry=self.registry)

        self._first = seconds("time_to_first_token", "From a request's arrival to its first token")
        self._each = seconds("time_per_token", "Between tokens of a request, its mean")
        self._queue = seconds("queue", "From a request's arrival to its first pass")
        self._requests = Counter("moeforge_requests", "Requests that ended", ["outcome"], registry=self.registry)
        self._answers = Counter("moeforge_http_responses", "HTTP responses", ["status"], registry=self.registry)

    def ended(self, end: End) -> None:
        """A request of the engine has ended."""
        usage = end.usage
        self._requests.labels(end.stop).inc()
        self._queue.observe(usage.queued_s)
        if usage.first_s is not None:
            self._first.observe(usage.first_s)
            if usage.written_tokens > 1:
                self._each.observe((usage.total_s - usage.first_s) / (usage.written_tokens - 1))

    def answered(self, status: int) -> None:
        """A response was sent."""
        self._answers.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """What the engine reports, read when asked for."""

    def __init__(self, engine: Engine, machine_gb_s: float | None) -> None:
        self.engine, self.machine_gb_s = engine, machine_gb_s

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        report = self.engine.report()
        gauges = {
            "running_requests": (report.running, "Texts being read or written"),
            "waiting_requests": (report.waiting, "Requests without a place yet"),
            "kv_blocks_used": (report.blocks_used, "Blocks of keys and values that somebody uses"),
            "kv_blocks_cached": (report.blocks_cached, "Blocks kept for texts that start alike"),
            "kv_blocks_total": (report.blocks_total, "All blocks"),
            "weight_bytes_per_token": (
                report.weight_bytes / max(report.tokens_written, 1),
                "Of weights read, per token written",
            ),
            "weight_gigabytes_per_second": (
                report.weight_bytes / 1e9 / max(report.busy_s, 1e-9),
                "Weights read while busy",
            ),
        }
        if self.machine_gb_s is not None:
            gauges["machine_gigabytes_per_second"] = self.machine_gb_s, "Memory bandwidth of this machine, measured"
        for name, (value, what) in gauges.items():
            yield GaugeMetricFamily(f"moeforge_{name}", what, value)
        counters = {
            "tokens_read": (report.tokens_read, "Tokens of prompts that were computed"),
            "tokens_reused": (report.tokens_reused, "Tokens of prompts whose keys and values were there"),
            "tokens_written": (report.tokens_written, "Tokens written"),
            "preemptions": (report.preemptions, "Texts that had to make room"),
            "passes": (report.passes, "Forward passes"),
        }
        for name, (value, what) in counters.items():
            yield CounterMetricFamily(f"moeforge_{name}", what, value)
        yield from _loads(report.tokens_per_expert)


def _loads(tokens_per_expert: dict[int, list[int]]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    counts = CounterMetricFamily("moeforge_expert_tokens", "Choices of all tokens together", labels=["layer", "expert"])
    entropy = GaugeMetricFamily("moeforge_load_entropy", "Of the loads, 1 when even", labels=["layer"])
    for layer, loads in tokens_per_expert.items():
        total = sum(loads)
        for expert, load in enumerate(loads):
            counts.add_metric([str(layer), str(expert)], load)
        if total and len(loads) > 1:
            shares = [load / total for load in loads if load]
            entropy.add_metric([str(layer)], -sum(p * log(p) for p in shares) / log(len(loads)))
    yield counts
    yield entropy
