"""A setting that changes while training runs: a number, or a ramp over optimizer steps."""

from typing import Literal, Self

from pydantic import Field, model_validator

from moeforge.config import Config, Count


class Ramp(Config):
    """From ``start`` to ``end`` over ``steps`` optimizer steps, then ``end`` for good, also outside training."""

    start: float
    """At step 0."""
    end: float
    """From ``steps`` on, and wherever no step is known."""
    steps: Count = Field(ge=1)
    """How long it takes."""
    shape: Literal["linear", "geometric"] = "linear"
    """Equal differences, or equal ratios (both ends must then be above zero)."""

    @model_validator(mode="after")
    def _ratios_exist(self) -> Self:
        if self.shape == "geometric" and min(self.start, self.end) <= 0:
            raise ValueError("shape: geometric needs both ends above zero")
        return self

    def at(self, step: int | None) -> float:
        """The value at an optimizer step."""
        done = 1.0 if step is None else min(1.0, step / self.steps)
        if self.shape == "geometric":
            return self.start ** (1 - done) * self.end**done
        return self.start + (self.end - self.start) * done


Scheduled = float | Ramp


def at(value: Scheduled, step: int | None) -> float:
    """The value of a setting at an optimizer step."""
    return value.at(step) if isinstance(value, Ramp) else value
