"""Packed data kept between runs: encoding a corpus with a BPE takes most of a minute, reading it back no time.

Lies in ``$MOEFORGE_CACHE``, by default ``~/.cache/moeforge``; the folder can be deleted at any time.
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import tokenizers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moeforge.data.packing import Packed
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError

Entry = tuple[Packed, Packed, Tokenizer]
"""Training part, validation part, tokenizer."""
_FORMAT = "3"


def entry_folder(tokenizer: str, parts: Iterable[Iterable[str]]) -> Path:
    """Where the entry for these texts is, whether it exists or not; ``tokenizer`` is its JSON or its settings."""
    digest = hashlib.sha256()
    for text in (_FORMAT, tokenizers.__version__, tokenizer, *(text for part in parts for text in (*part, "\0"))):
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    root = os.environ.get("MOEFORGE_CACHE") or Path.home() / ".cache" / "moeforge"
    return Path(root).expanduser() / "packed" / digest.hexdigest()[:32]


def load(folder: Path) -> Entry | None:
    """The entry in ``folder``; None when there is none, or it is damaged and will be made again."""
    try:
        parts = [Packed(**load_file(folder / f"{part}.safetensors")) for part in ("train", "validation")]
        return parts[0], parts[1], Tokenizer.open(folder)
    except (OSError, SafetensorError, TypeError, UserError):
        return None


def store(folder: Path, entry: Entry) -> None:
    """Writes the entry whole or not at all. A cache that can't be written costs time, not the run: it only warns."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / "entry"
            whole.mkdir()
            for name, part in zip(("train", "validation"), entry[:2], strict=True):
                save_file(
                    {field.name: getattr(part, field.name) for field in fields(part)}, whole / f"{name}.safetensors"
                )
            entry[2].save(whole)
            whole.rename(folder)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"packed data is not cached in {folder}: {error}", stacklevel=2)
