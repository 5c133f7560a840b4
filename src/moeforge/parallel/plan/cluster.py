"""A cluster as a planner knows it: how fast a device computes, reads memory, and sends to others near and far.

A collective takes ``latency`` for each message that a process sends, and its bytes over ``bandwidth`` (alpha-beta); an
operation takes ``overhead`` for each kernel, and the longer of FLOPs over ``flops`` and bytes over ``bandwidth``
(roofline).
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moeforge.config import Config, build, read_yaml

Kind = Literal["all_to_all", "all_reduce", "all_gather", "reduce_scatter"]
PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def _amount(unit: str, least: float = 1e-300) -> Any:
    """A number from ``least`` on, plain or with this unit: ``80 GB``, ``25 GB/s``, ``10 us``."""
    pattern = re.compile(rf"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([numkMGTP]?){re.escape(unit)}\s*", re.ASCII)

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        found = pattern.fullmatch(value)
        try:
            return float(found[1]) * PREFIXES[found[2]] if found else float(value)
        except ValueError:
            raise ValueError(f"'{value}' is no amount like 5e9 or 5 G{unit}") from None

    return Annotated[float, BeforeValidator(read), Field(ge=least, allow_inf_nan=False)]


class Line(Config):
    """What one kind of collective costs on a link."""

    latency: _amount("s")
    """Of one message."""
    bandwidth: _amount("B/s")
    """That one device sends at, while it receives as much."""


class Link(Line):
    """Between devices."""

    kinds: dict[Kind, Line] = Field(default_factory=dict)
    """Collectives that differ, as measured."""

    def line(self, kind: str) -> Line:
        """Of one kind of collective."""
        return self.kinds.get(kind, self)  # type: ignore[call-overload]


class Cluster(Config):
    """Nodes of equal devices."""

    name: str = "cluster"
    nodes: int = Field(ge=1)
    devices_per_node: int = Field(ge=1)
    memory: _amount("B")
    """Of one device."""
    flops: _amount("FLOP/s")
    """That one device reaches in large matrix products of the type that the run has."""
    half_width: float = Field(0.0, ge=0)
    """How wide a matrix is in products that reach half of ``flops``: narrow ones, as attention's scores, reach less."""
    bandwidth: _amount("B/s")
    """Of one device's memory."""
    overhead: _amount("s", least=0.0) = 0.0
    """That a kernel takes whatever its size."""
    host: _amount("B/s") | None = None
    """Between a device and its node's memory, for each device; what is offloaded is updated there no faster."""
    overlap: bool = True
    """Whether a device computes while it sends."""
    inside: Link
    """Between devices of a node."""
    between: Link | None = None
    """Between nodes, for each device; null: there is one node."""
    source: str | None = None
    """Where the numbers are from."""

    @model_validator(mode="after")
    def _connected(self) -> Self:
        if self.nodes > 1 and self.between is None:
            raise ValueError(f"nodes = {self.nodes}, and between, the link from node to node, is missing")
        return self

    @property
    def size(self) -> int:
        """Devices; each runs one process."""
        return self.nodes * self.devices_per_node


def read_cluster(path: Path) -> Cluster:
    """Raises UserError for a file that is missing or describes no cluster."""
    return build(Cluster, read_yaml(path), source=str(path))
