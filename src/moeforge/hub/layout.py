"""How our tensors lie in somebody else's files: under which names, in how many parts, in which order of dimensions.

A table of names says it once per parameter; everything else (what is missing, what is left over, which shape a file
must have, reading, writing) follows from the table and the model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from moeforge.errors import UserError


class Change(NamedTuple):
    """A rearrangement of one tensor and its inverse; both give views or small copies, and work on meta tensors."""

    load: Callable[[Tensor], Tensor]
    """As on disk -> as ours."""
    save: Callable[[Tensor], Tensor]
    """As ours -> as on disk."""


TRANSPOSED = Change(lambda x: x.transpose(-1, -2), lambda x: x.transpose(-1, -2))
"""The input dimension before the output's."""
ONE_ROW = Change(lambda x: x[0], lambda x: x[None])
"""A vector as a matrix of one row."""
GATE_UP_IN_TURN = Change(
    lambda x: x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2),
    lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
)
"""[E, 2H, ...]: rows of gate and up alternate on disk; ours are all of gate, then all of up."""


@dataclass(frozen=True)
class Layout:
    """One tensor of ours as a file has it: ``parts`` are equal slices of its output dimension, in order.

    ``{layer}`` and ``{expert}`` in the names stand for numbers; with ``{expert}`` every expert has its own tensors.
    """

    parts: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    """Done one after the other while reading, undone in reverse while writing."""


Names = Mapping[str, tuple[Layout, ...]]
"""Our parameter, with ``{layer}`` for its block's number -> the ways it is found on disk; saving takes the first."""


@dataclass(frozen=True)
class Piece:
    """One tensor on disk, and which part of which of our parameters it is."""

    name: str
    parameter: str
    expert: int | None
    """Which of the stack; None: all of them."""
    part: int
    of: int
    changes: tuple[Change, ...] = field(repr=False)

    def of_ours(self, tensor: Tensor) -> Tensor:
        """The view of our parameter that this piece fills."""
        whole = tensor if self.expert is None else tensor[self.expert]
        return whole if self.of == 1 else whole.chunk(self.of)[self.part]

    def as_ours(self, tensor: Tensor) -> Tensor:
        """What was read, arranged as ``of_ours`` wants it."""
        for change in self.changes:
            tensor = change.load(tensor)
        return tensor

    def as_theirs(self, tensor: Tensor) -> Tensor:
        """Our parameter -> the tensor that is written."""
        tensor = self.of_ours(tensor)
        for change in reversed(self.changes):
            tensor = change.save(tensor)
        return tensor


def itself(parameter: str) -> tuple[Layout, ...]:
    """The layout of our own folders: every tensor under its own name."""
    return (Layout((parameter,)),)


def layouts(names: Names | None, parameter: str) -> tuple[Layout, ...]:
    """The ways ``parameter`` may lie on disk, its layer filled in. Raises UserError when the table has no such row."""
    if names is None:
        return itself(parameter)
    found = re.match(r"blocks\.(\d+)\.", parameter)
    row = parameter if found is None else f"blocks.{{layer}}.{parameter[found.end() :]}"
    if row not in names:
        raise UserError(f"this family has no name for {parameter}")
    layer = found[1] if found else ""
    return tuple(
        Layout(tuple(part.replace("{layer}", layer) for part in layout.parts), layout.changes) for layout in names[row]
    )


def pieces(layout: Layout, parameter: str, tensor: Tensor) -> Iterator[Piece]:
    """The tensors on disk that hold ``parameter`` in this layout."""
    experts = range(len(tensor)) if "{expert}" in layout.parts[0] else (None,)
    for expert in experts:
        for part, name in enumerate(layout.parts):
            name = name.replace("{expert}", str(expert))
            yield Piece(name, parameter, expert, part, len(layout.parts), layout.changes)


def plan(model: nn.Module, names: Names | None, present: set[str] | None = None) -> list[Piece]:
    """Every piece of the model in the order of its parameters.

    Each parameter takes the first of its layouts of which something is ``present``, or else the first of all. Without
    ``present`` that is what saving writes.
    """
    found: list[Piece] = []
    for parameter, tensor in model.state_dict().items():
        ways = [list(pieces(layout, parameter, tensor)) for layout in layouts(names, parameter)]
        held = [way for way in ways if present and any(piece.name in present for piece in way)]
        found += (held or ways)[0]
    return found
