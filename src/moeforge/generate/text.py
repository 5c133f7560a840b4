"""Text as it is written: token by token, and never a part of what it has to stop before."""

from collections.abc import Sequence

from moeforge.data.tokenizers import Stream


class Held:
    """Lets text through as soon as no stop string can begin in it any more."""

    def __init__(self, stream: Stream, stops: Sequence[str]) -> None:
        self._stream, self._stops = stream, stops
        self._pending = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(the text that is certain with ``token``, whether a stop string came: then it is the last)."""
        return self._pass(self._stream.push(token))

    def finish(self) -> tuple[str, bool]:
        """The rest, and whether a stop string is in it."""
        text, stopped = self._pass(self._stream.finish())
        if not stopped:
            text, self._pending = text + self._pending, ""
        return text, stopped

    def _pass(self, new: str) -> tuple[str, bool]:
        self._pending += new
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            text, self._pending = self._pending[: min(found)], ""
            return text, True
        kept = self._possible()
        text, self._pending = self._pending[: len(self._pending) - kept], self._pending[len(self._pending) - kept :]
        return text, False

    def _possible(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stops):
                return length
        return 0
