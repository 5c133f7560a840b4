"""What ``moeforge bench serve`` measures, each in a process of its own: who writes texts, and how it is asked to.

A process is started with a ``Job`` as JSON, says ``{"active_bytes": ...}`` when its model is open, and answers each
line ``{"prompts": ..., "new": ...}`` with a ``Texts``. Whatever else is printed goes to stderr.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


@dataclass(frozen=True)
class Job:
    """What a contestant opens, once."""

    path: str
    """A model folder; a GGUF file for llama.cpp."""
    weights: str
    """As in ``generate.Settings``."""
    threads: int
    clients: int
    """Most texts at the same time."""
    length: int
    """Most tokens of one text."""
    active_share: float = 1.0
    """Of the weights, those that one token reads."""


class Texts(TypedDict):
    """What was written for some prompts."""

    tokens: list[list[int]]
    """Of each prompt."""
    times: list[list[float]]
    """Seconds from being asked to each of them."""


Write = Callable[[Sequence[Sequence[int]], int], Texts]
"""Prompts, and how many tokens to write after each: greedily, no fewer."""


def take_turns(opened: Callable[[Job], tuple[Write, float]]) -> None:
    """The whole program of a contestant. ``opened`` returns what writes, and the bytes of weights a token reads."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    write, active_bytes = opened(Job(**json.loads(sys.argv[1])))
    say({"active_bytes": active_bytes})
    for line in sys.stdin:
        asked = json.loads(line)
        say(write(asked["prompts"], asked["new"]))
