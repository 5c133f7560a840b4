"""Twenty times in a row, one of two processes of a run is killed at a random instant: what that costs.

``PYTHONPATH=. python benchmarks/parallel_kills.py`` does what ``tests/parallel/test_kills.py`` holds, with checkpoints
written at once and in the background, and writes ``parallel_kills.json``. A run that lost more would end it.
"""

import tempfile
from pathlib import Path

from report import write

from tests.parallel.conftest import write_tiny
from tests.parallel.test_kills import kills


def main() -> None:
    """Both ways of writing checkpoints."""
    found = {}
    for name, background in (("at once", "false"), ("in the background", "true")):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = kills(write_tiny(Path(folder)), Path(folder), background)
        print(name, found[name])
    write("parallel_kills", found)


if __name__ == "__main__":
    main()
