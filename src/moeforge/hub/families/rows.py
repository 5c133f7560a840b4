"""Rows of a family's table: what a field of its config.json says about our settings, read in both directions.

A row knows the fields it reads and what transformers takes where they are absent. ``read`` gives our settings by dotted
path, ``write`` gives the fields back. Both raise ValueError for what cannot be said on the other side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Tree = dict[str, Any]
Settings = Mapping[str, Any]
"""Our settings: what ``Ours.__getitem__`` finds by dotted path."""


@dataclass(frozen=True)
class At:
    """A field that is one of our settings, or several of the same value."""

    name: str
    default: Any
    paths: str
    """Dotted, separated by spaces; the first that is there is the one written."""
    words: Mapping[Any, Any] = field(default_factory=dict)
    """Theirs -> ours, where the two differ."""
    only: bool = False
    """Whether there are no other values than those of ``words``."""
    also: str | None = None
    """A second name of the field; what is written has the first."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The one field, under either name."""
        return {self.name: self.default, **({self.also: None} if self.also else {})}

    def read(self, theirs: Mapping[str, Any]) -> Tree:
        """The value at every path."""
        value = theirs[self.name]
        if self.also and theirs[self.also] is not None:
            if value not in (self.default, theirs[self.also]):
                raise ValueError(
                    f"{self.name} is {value!r} and {self.also} is {theirs[self.also]!r}: they are the same"
                )
            value = theirs[self.also]
        if isinstance(value, str | int | float | None) and value in self.words:
            value = self.words[value]
        elif self.only:
            raise ValueError(f"{self.name} is {value!r}; what the decoder has is {', '.join(map(repr, self.words))}")
        return dict.fromkeys(self.paths.split(), value)

    def write(self, ours: Settings) -> Tree:
        """The value at the first path that is there."""
        found = [ours[path] for path in self.paths.split() if path in ours]
        value = found[0] if found else self.words.get(self.default, self.default)
        back = [theirs for theirs, here in self.words.items() if here == value and type(here) is type(value)]
        if self.only and not back:
            raise ValueError(
                f"{self.paths.split()[0]} = {value!r}; {self.name} can be {', '.join(map(repr, self.words))}"
            )
        return {self.name: back[0] if back else value}


@dataclass(frozen=True)
class Only:
    """A field of which we do some values and not others."""

    name: str
    values: tuple[Any, ...]
    """The first is what stands where the field is absent."""
    why: str = "the decoder does not do that"

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The one field."""
        return {self.name: self.values[0]}

    def read(self, theirs: Mapping[str, Any]) -> Tree:
        """Nothing: these values are how the decoder works."""
        if theirs[self.name] not in self.values:
            allowed = " or ".join(map(repr, self.values))
            raise ValueError(f"{self.name} is {theirs[self.name]!r} and not {allowed}: {self.why}")
        return {}

    def write(self, ours: Settings) -> Tree:
        """Nothing: absent says the same."""
        return {}


@dataclass(frozen=True)
class Joint:
    """Fields that say something only together, or a setting that takes a line of arithmetic."""

    defaults: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Tree]
    write: Callable[[Settings], Tree]


Row = At | Only | Joint
