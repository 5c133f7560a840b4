"""What goes into an engine and what comes out of it, event by event."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moeforge.generate.sample import Sampling

Stop = Literal["end of document", "stop", "max_tokens", "context full", "cancelled", "failed"]
"""Why there are no more tokens: the model ended its text, a stop string or id came, there is no more to write or no
more room, nobody waits for them, or something went wrong with this request alone."""


@dataclass(frozen=True)
class Likely:
    """A token and log(its probability) by the model, before temperature, penalties and cuts."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Read:
    """Comes first, where ``Sampling.prompt_logprobs`` asked for it: one entry for each token of the prompt."""

    tokens: tuple[tuple[Likely, tuple[Likely, ...]] | None, ...]
    """The token and the likeliest at its place, best first; None for the first token, before which is nothing."""


@dataclass(frozen=True)
class Token:
    """One token that was written."""

    token_id: int
    text: str
    """What became printable with it: empty inside a character of several tokens or while a stop string may follow."""
    logprob: float | None = None
    """Where ``Sampling.logprobs`` asked for it."""
    alternatives: tuple[Likely, ...] = ()
    """The likeliest ``Sampling.logprobs`` tokens at its place, best first."""
    experts: dict[int, list[int]] | None = None
    """Where the request asked for it: by layer, heaviest first, those of this token's own position, where it is read.
    Such a token comes one pass later, and the last one is read for it alone; without, if that is cancelled."""


@dataclass(frozen=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    written_tokens: int
    reused_tokens: int
    """Of the prompt, those whose keys and values were there already."""
    queued_s: float
    """From submitting to the first pass."""
    first_s: float | None
    """From submitting to the first token."""
    total_s: float


@dataclass(frozen=True)
class End:
    """Always the last event, and always comes."""

    stop: Stop
    usage: Usage
    text: str = ""
    """Printable text held back until it was sure that no stop string is in it."""
    error: str | None = None
    """Why, for ``failed``: one line for who sent the request."""


Event = Read | Token | End
Put = Callable[[Event], None]
"""Called on the engine's thread for each event; returns at once and never raises."""


@dataclass(eq=False)
class Request:
    """One text to go on with; made by ``Engine.submit``."""

    prompt: Sequence[int]
    """Token ids, what documents start with included."""
    sampling: Sampling
    put: Put
    show_experts: bool = False
    written: list[int] = field(default_factory=list)
