"""Work beside the training loop: one piece at a time, in a thread, whose error comes out where the next one begins."""

import threading
from collections.abc import Callable
from typing import Self

PATIENCE = 10.0
"""Seconds for what is under way when training fails; with other processes gone it may never end."""


class Background:
    """A context: at its end, what is under way is waited for."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def begin(self, work: Callable[[], object]) -> None:
        """Starts it when the one before is done. Raises what that one raised."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is under way. Raises what the work raised."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join(PATIENCE)
