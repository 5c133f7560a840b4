"""Writing that is whole or not at all: a folder or a file appears complete, or what was there stays."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from moeforge.errors import UserError


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes ``folder`` from what ``fill`` writes into a fresh one beside it; on any failure the old one is untouched.

    Raises UserError when the disk is full or not writable.
    """
    fresh = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        fill(fresh)
        replace_folder(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}. What was there before is untouched") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Makes one file from what ``fill`` writes into a fresh one beside it, or leaves the old one. Raises UserError."""
    fresh = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(fresh)
        _flush(fresh)
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes one text file whole, or leaves the old one. Raises UserError when it cannot."""
    write_file(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def _flush(path: Path) -> None:
    """To the disk itself: a rename that survives a power cut must not point at data that did not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Puts a folder that is written in the place of another, or of none. Raises OSError."""
    for path in [*fresh.iterdir(), fresh]:
        _flush(path)
    if not folder.exists():
        fresh.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old)
