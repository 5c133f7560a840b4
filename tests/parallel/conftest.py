"""Two and four processes that all tests of this folder share."""

from collections.abc import Callable, Iterator

import pytest

from tests.parallel.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Processes]]:
    """``processes(4)``: four ranks, started when first asked for."""
    started: dict[int, Processes] = {}

    def of(size: int) -> Processes:
        if size not in started:
            started[size] = Processes(size, tmp_path_factory.mktemp("store") / "file")
        return started[size]

    yield of
    for group in started.values():
        group.close()
