"""What a server allows: who may ask, how much, for how long."""

import hmac
from pathlib import Path

from pydantic import Field

from moeforge.config import Config, Count
from moeforge.errors import UserError


class Limits(Config):
    """Of one server; each is answered with an error that names it."""

    max_request_bytes: Count = Field(4 << 20, ge=1)
    """Of one request's body: more is answered with 413."""
    max_n: Count = Field(16, ge=1)
    """Completions of one prompt, and prompts of one request."""
    max_logprobs: Count = Field(20, ge=0)
    """Alternatives per token."""
    max_seconds: float = Field(600.0, gt=0)
    """For one request; it then ends with what it has, as at max_tokens."""


class Keys:
    """The keys that may ask; none: everybody may. Compared in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, path: Path | None, environment: str | None) -> "Keys":
        """One key per line of the file, lines that start with # left out; or those of the variable, between commas.

        Raises UserError when a file was named and has none.
        """
        if path is None:
            return cls([key.strip() for key in (environment or "").split(",") if key.strip()])
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: API keys cannot be read: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"{path} holds no API key: write one per line")
        return cls(keys)

    def allow(self, authorization: str | None) -> bool:
        """Whether a header ``Authorization: Bearer KEY`` has one of the keys."""
        kind, _, key = (authorization or "").partition(" ")
        given = key.strip().encode()
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return not self._keys or (kind.lower() == "bearer" and any(found))
