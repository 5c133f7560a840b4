"""One piece of text with a stable name: what every corpus yields and what training and validation are split by."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text that stands for itself: attention never crosses from one document to the next."""

    name: str
    """Stable id, such as a relative path or ``path#line``. It decides between training and validation."""
    text: str
    domain: str = ""
    """What kind of text it is, for gates that look that up; empty where a corpus tells none apart."""


def draw(key: str) -> float:
    """A number in [0, 1) fixed by ``key`` alone: the same on every machine, in every run (sha256, not ``hash``)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
