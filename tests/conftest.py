"""Settings that every test runs under: one thread per worker, hypothesis without a stopwatch, a fixed torch seed."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before the first import of torch: two workers with a thread each are faster than two that fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("local", deadline=None, max_examples=30, print_blob=True)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """The same random numbers for a test whatever ran before it in its worker."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; a test that asks for it is skipped where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets, and there is no {folder}")
    return folder
