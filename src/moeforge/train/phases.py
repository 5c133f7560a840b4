"""Weights that take turns: in each phase of a cycle some of them move, and the others stay bit for bit as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from pydantic import Field
from torch import nn

from moeforge.config import Config, Count
from moeforge.errors import UserError


class Phase(Config):
    """Some steps in which only a part of the weights moves. What a controller moves is no weight and goes on."""

    steps: Count = Field(ge=1)
    """How long it lasts; after the last phase comes the first one again."""
    trains: tuple[str, ...] = ("*",)
    """Patterns of names of the weights that move, as ``*.router.*``."""
    holds: tuple[str, ...] = ()
    """Patterns of those among them that do not."""


def phase_at(phases: Sequence[Phase], step: int) -> Phase | None:
    """The phase of optimizer step ``step`` (from 0); None without phases."""
    left = step % max(1, sum(phase.steps for phase in phases))
    for phase in phases:
        if left < phase.steps:
            return phase
        left -= phase.steps
    return None


def check_phases(phases: Sequence[Phase], model: nn.Module) -> None:
    """Raises UserError for a pattern that names no weight, and for a phase in which none moves."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for place, phase in enumerate(phases):
        for pattern in (*phase.trains, *phase.holds):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"phases.{place}: '{pattern}' names no weight that can move; names are like {names[0]}")
        if not any(_moves(name, phase) for name in names):
            raise UserError(f"phases.{place}: nothing moves: holds covers all that trains names")


def hold(model: nn.Module, phase: Phase | None) -> None:
    """Takes away the gradients of what does not move: the optimizer then leaves it, its decay and moments alone."""
    if phase is None:
        return
    for name, parameter in model.named_parameters():
        if not _moves(name, phase):
            parameter.grad = None


def _moves(name: str, phase: Phase) -> bool:
    trains, holds = (any(fnmatchcase(name, each) for each in patterns) for patterns in (phase.trains, phase.holds))
    return trains and not holds
