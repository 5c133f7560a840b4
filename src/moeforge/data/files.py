"""Documents from local text, JSON lines and parquet files, and from folders of them."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moeforge.data.document import Document
from moeforge.errors import UserError

_TEXT = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh"}
_LINES = {".jsonl", ".ndjson"}
_TABLE = {".parquet"}
_GZIPPED = {".gz"}
PIECE = 8192
"""Characters per document when a lone text file has to give both training and validation."""


def documents(paths: list[str], text_field: str, domain_field: str | None = None) -> Iterator[Document]:
    """Every document under ``paths``, in their order; folders are searched to the bottom, sorted by path.

    A document's domain is the ``domain_field`` of its row, or else the first folder below the one that was named.
    A named file of unknown suffix is read as text; in folders such files are passed over. A text file that is all
    there is gets cut at paragraphs. Raises UserError for what is missing, empty, malformed or not UTF-8.
    """
    found = [(file, name) for path in paths for file, name in _expand(Path(path).expanduser())]
    if len(found) == 1 and _kind(found[0][0]) not in _LINES | _TABLE:
        yield from _pieces(*found[0])
        return
    for file, name in found:
        for document in _read(file, name, text_field, domain_field):
            yield document if document.domain else replace(document, domain=name.rpartition("/")[0].partition("/")[0])


def _expand(path: Path) -> Iterator[tuple[Path, str]]:
    """The files meant by ``path`` with their names, which don't depend on where the folder stands."""
    if not path.exists():
        raise UserError(f"data.path: {path} does not exist")
    if path.is_file():
        yield path, path.name
        return
    known = _TEXT | _LINES | _TABLE
    inside = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    readable = [(file, name) for name, file in inside if _kind(file) in known]
    if not readable:
        kinds = " ".join(sorted(known))
        raise UserError(f"data.path: no readable file under {path}; known suffixes: {kinds}, also with .gz")
    yield from readable


def _kind(path: Path) -> str:
    """The suffix that says how to read a file, with ``.gz`` looked through."""
    suffixes = path.suffixes
    return (suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _GZIPPED else path.suffix).lower()


def _read(path: Path, name: str, text_field: str, domain_field: str | None) -> Iterator[Document]:
    if _kind(path) in _LINES:
        return _json_lines(path, name, text_field, domain_field)
    if _kind(path) in _TABLE:
        return _parquet(path, name, text_field, domain_field)
    return iter([Document(name, _text(path))])


def _text(path: Path) -> str:
    """The whole file, line ends as they are: bits per byte count the bytes that are there."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix in _GZIPPED else content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _pieces(path: Path, name: str) -> Iterator[Document]:
    """A lone file as documents of about ``PIECE`` characters that end at a paragraph, a line, or a hard stop."""
    text = _text(path)
    if not text.strip():
        raise UserError(f"{path} is empty: there is no text to train on")
    start = number = 0
    while start < len(text):
        end = _piece_end(text, start)
        yield Document(f"{name}#{number}", text[start:end])
        start, number = end, number + 1


def _piece_end(text: str, start: int) -> int:
    if len(text) - start <= PIECE:
        return len(text)
    for pattern in (r"\n\s*\n", r"\n"):
        if match := re.compile(pattern).search(text, start + PIECE // 2, start + 2 * PIECE):
            return match.end()
    return start + PIECE


def _json_lines(path: Path, name: str, text_field: str, domain_field: str | None) -> Iterator[Document]:
    for number, line in enumerate(io.StringIO(_text(path)), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} holds {type(row).__name__}, not an object with a field '{text_field}'")
        yield _document(f"{name}#{number}", row, text_field, domain_field, where)


def _document(name: str, row: dict[str, object], text_field: str, domain_field: str | None, where: str) -> Document:
    domain = _field(row, domain_field, "domain_field", where) if domain_field else ""
    return Document(name, _field(row, text_field, "text_field", where), domain)


def _field(row: dict[str, object], field: str, setting: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where} has no field '{field}'; it has: {', '.join(row)}. Set data.{setting} to one.")
    return checked(row[field], f"{where}: field '{field}'")


def checked(value: object, where: str) -> str:
    """``value`` if it is text that UTF-8 can hold (JSON can spell half a surrogate pair). Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a surrogate pair (character {error.start}), not UTF-8 text") from error
    return value


def _parquet(path: Path, name: str, text_field: str, domain_field: str | None) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet needs one more package: pip install 'moeforge[data]'") from error
    try:
        table = parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        wanted = {"text_field": text_field} | ({"domain_field": domain_field} if domain_field else {})
        for setting, column in wanted.items():
            if column not in columns:
                raise UserError(f"{path} has no column '{column}'; it has: {', '.join(columns)}. Set data.{setting}.")
        rows = (row for batch in table.iter_batches(columns=list(wanted.values())) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield _document(f"{name}#{number}", row, text_field, domain_field, f"{path} row {number}")
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
