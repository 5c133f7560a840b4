"""A model to compress: ours, or one of transformers whose family has no table here."""

from pathlib import Path

from moeforge.compress.stream import Streamed
from moeforge.compress.theirs import StreamedTheirs
from moeforge.errors import UserError
from moeforge.hub.theirs import is_theirs

Source = Streamed | StreamedTheirs


def open_source(folder: str | Path) -> Source:
    """Raises UserError as the two do."""
    return StreamedTheirs(folder) if is_theirs(Path(folder)) else Streamed(folder)


def ours(source: Source, asked: str) -> Streamed:
    """Raises UserError for a model of transformers, of which that cannot be ``asked``."""
    if isinstance(source, Streamed):
        return source
    raise UserError(
        f"{asked} needs a family that we have a table of: leave it out, and {source.folder} is packed into a folder "
        f"that transformers opens where moeforge is imported"
    )
