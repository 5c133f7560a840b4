"""The standard library of the running interpreter as a corpus: its Python sources and its documentation topics.

About 12 MB of code and 0.5 MB of English on CPython 3.11 to 3.13, on every machine that can run moeforge.
"""

import importlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moeforge.data.document import Document
from moeforge.errors import UserError

SALT = "stdlib-275/"
"""Goes before a module's name in the split's hash. Chosen among 400 because, on CPython 3.11, 3.12 and 3.13 alike, it
holds out 4.8-5.2 % of the code and 8 % of the topics, spread over some fifteen modules of ordinary code."""

_TOPICS = "topics/"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# pydoc_data is the topics once more, as one big literal; the other two describe the machine Python was built on.
_SKIPPED_MODULES = ("pydoc_data", "_sysconfigdata", "config-")


def documents(root: Path | None = None) -> Iterator[Document]:
    """Sources by path (``asyncio/events.py``), then topics (``topics/assert``), both sorted; two domains.

    ``root`` is the library's folder; by default the running interpreter's. Raises UserError where it has no sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    sources = list(_sources(root))
    if not sources:
        raise UserError(
            f"this Python has no standard library sources in {root}; "
            "use another Python, or train on your own text with --data.type=files --data.path=FOLDER"
        )
    yield from sources
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for key in sorted(topics):
        yield Document(_TOPICS + key, topics[key], domain="topics")


def module(name: str) -> str:
    """What decides the split of document ``name``: its top-level package or module, or the topic itself."""
    return name if name.startswith(_TOPICS) else name.partition("/")[0].removesuffix(".py")


def _sources(root: Path) -> Iterator[Document]:
    for inside in sorted(_paths(root), key=Path.as_posix):
        try:
            yield Document(inside.as_posix(), (root / inside).read_text(encoding="utf-8"), domain="code")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding on purpose


def _paths(root: Path) -> Iterator[Path]:
    """Sources below ``root``, relative to it. Skipped folders are not entered: site-packages can be huge."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_MODULES)]
        for name in names:
            if name.endswith(".py") and not name.startswith(_SKIPPED_MODULES):
                yield Path(folder, name).relative_to(root)
