"""Corpora: the split is fixed by names, and every kind of bad input is one clear message."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeforge.config import Config, build
from moeforge.data import files, stdlib
from moeforge.data.corpora import Corpus, Datasets, Files, Source, Stdlib, split
from moeforge.data.document import Document, draw
from moeforge.errors import UserError

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "text" / "tinyshakespeare.txt"


class Listed(Source):
    """A corpus of named one-line documents."""

    names: list[str]

    def documents(self) -> Iterator[Document]:
        return (Document(name, "text") for name in self.names)


class Holder(Config):
    data: Corpus = Stdlib()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_split_depends_on_names_alone() -> None:
    names = [f"d{number}" for number in range(400)]
    train, validation = split(Listed(names=names, validation_fraction=0.1))
    assert [document.name for document in validation] == [name for name in names if draw(name) < 0.1]
    assert len(train) + len(validation) == 400
    held = {document.name for document in split(Listed(names=names[::-2], validation_fraction=0.1))[1]}
    assert held == {document.name for document in validation} & set(names[::-2])


def test_draw_never_changes() -> None:
    assert draw("asyncio") == 0x8EB9B54D53977674 / 2**64


def test_at_least_one_document_is_held_out() -> None:
    names = ["a", "b", "c"]
    train, validation = split(Listed(names=names, validation_fraction=1e-9))
    assert [document.name for document in validation] == [min(names, key=draw)]
    assert len(train) == 2


def test_no_document_left_to_train_on() -> None:
    with pytest.raises(UserError, match=r"no document to train on.*validation_fraction"):
        split(Listed(names=["a", "b"], validation_fraction=1 - 1e-9))


def test_stdlib_split_is_by_module_and_a_twentieth() -> None:
    train, validation = split(Stdlib())
    size = {
        part: sum(len(document.text.encode()) for document in documents)
        for part, documents in (("train", train), ("validation", validation))
    }
    assert 0.04 < size["validation"] / sum(size.values()) < 0.08
    assert sum(size.values()) > 8_000_000
    modules = [{stdlib.module(document.name) for document in part} for part in (train, validation)]
    assert not modules[0] & modules[1]
    assert len(modules[1]) > 15
    topics = [document for document in validation if document.name.startswith("topics/")]
    assert topics
    assert len(topics) < len(validation)


def test_stdlib_leaves_out_tests_and_installed_packages() -> None:
    names = [document.name for document in stdlib.documents()]
    assert "asyncio/events.py" in names
    assert "topics/assert" in names
    assert not [name for name in names if {"test", "tests", "site-packages", "pydoc_data"} & set(name.split("/"))]
    code = [name for name in names if not name.startswith("topics/")]
    assert code == sorted(code)


def test_stdlib_without_sources_and_with_other_encodings(tmp_path: Path) -> None:
    write(tmp_path / "test" / "a.py", "pass")
    with pytest.raises(UserError, match="no standard library sources"):
        next(stdlib.documents(tmp_path))
    write(tmp_path / "latin.py", b"# caf\xe9")
    write(tmp_path / "good.py", "pass")
    assert next(stdlib.documents(tmp_path)) == Document("good.py", "pass", "code")


def test_files_of_a_folder_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a" / "x.md", "one")
    write(tmp_path / "a" / "x.png", b"\x89PNG")
    write(tmp_path / "c.txt.gz", gzip.compress(b"drei\r\n"))
    write(tmp_path / "d.jsonl", '{"text": "four"}\n\n{"text": "five"}\n')
    write(tmp_path / "e.jsonl.gz", gzip.compress(b'{"text": "s\xc3\xa9x"}'))
    assert list(Files(path=str(tmp_path)).documents()) == [
        Document("a/x.md", "one", "a"),
        Document("b.txt", "two"),
        Document("c.txt.gz", "drei\r\n"),
        Document("d.jsonl#1", "four"),
        Document("d.jsonl#3", "five"),
        Document("e.jsonl.gz#1", "séx"),
    ]


def test_a_domain_is_the_first_folder_or_a_field(tmp_path: Path) -> None:
    for place in ("top.txt", "law/acts/one.txt", "verse/two.txt"):
        write(tmp_path / place, place)
    write(tmp_path / "verse" / "rows.jsonl", '{"text": "a", "kind": "ode"}\n{"text": "b", "kind": "epic"}\n')
    folders = [(document.name, document.domain) for document in Files(path=str(tmp_path)).documents()]
    assert [domain for _, domain in folders] == ["law", "", "verse", "verse", "verse"]
    by_field = Files(path=str(tmp_path / "verse" / "rows.jsonl"), domain_field="kind")
    assert [document.domain for document in by_field.documents()] == ["ode", "epic"]
    both = Files(path=str(tmp_path), domain_field="kind").documents()
    assert [document.domain for document in both] == ["law", "", "ode", "epic", "verse"]
    with pytest.raises(UserError, match=r"has no field 'genre'; it has: text, kind. Set data.domain_field to one"):
        list(by_field.replace(domain_field="genre").documents())


def test_code_and_topics_are_the_domains_of_the_standard_library() -> None:
    train, validation = split(Stdlib())
    for part in (train, validation):
        assert {document.domain for document in part} == {"code", "topics"}
        assert all((document.domain == "topics") == document.name.startswith("topics/") for document in part)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"body": ["one", "two", None]}), tmp_path / "t.parquet")
    found = Files(path=str(tmp_path / "t.parquet"), text_field="body").documents()
    assert [next(found), next(found)] == [Document("t.parquet#0", "one"), Document("t.parquet#1", "two")]
    with pytest.raises(UserError, match=r"row 2: field 'body' holds NoneType"):
        next(found)
    parquet.write_table(arrow.table({"text": ["one"], "kind": ["ode"]}), tmp_path / "k.parquet")
    (document,) = Files(path=str(tmp_path / "k.parquet"), domain_field="kind").documents()
    assert document == Document("k.parquet#0", "one", "ode")
    with pytest.raises(UserError, match=r"no column 'genre'; it has: text, kind. Set data.domain_field"):
        list(Files(path=str(tmp_path / "k.parquet"), domain_field="genre").documents())
    (tmp_path / "k.parquet").unlink()
    with pytest.raises(UserError, match=r"no column 'text'; it has: body"):
        list(Files(path=str(tmp_path)).documents())
    write(tmp_path / "bad.parquet", "PAR?")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(Files(path=str(tmp_path / "bad.parquet")).documents())


def test_a_lone_text_file_is_cut_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number} " + "word " * 100 + "\n\n" for number in range(200)]
    path = write(tmp_path / "book.txt", "".join(paragraphs))
    pieces = list(Files(path=str(path)).documents())
    assert "".join(piece.text for piece in pieces) == "".join(paragraphs)
    assert all(piece.text.startswith("paragraph") for piece in pieces)
    assert all(files.PIECE / 2 < len(piece.text) <= 2 * files.PIECE for piece in pieces[:-1])
    train, validation = split(Files(path=str(path)))
    assert train
    assert validation


def test_a_lone_line_without_breaks_is_cut_too(tmp_path: Path) -> None:
    path = write(tmp_path / "line.txt", "x" * 50_000)
    pieces = [piece.text for piece in Files(path=str(path)).documents()]
    assert "".join(pieces) == "x" * 50_000
    assert len(pieces) == 7


def test_real_text_splits() -> None:
    if not SHAKESPEARE.exists():
        pytest.skip(f"needs {SHAKESPEARE}")
    train, validation = split(Files(path=str(SHAKESPEARE)))
    held = sum(len(document.text) for document in validation)
    assert 0.01 < held / (held + sum(len(document.text) for document in train)) < 0.12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"bad\.jsonl:2 is not JSON"),
        ('{"body": "a", "id": 1}\n', r"bad\.jsonl:1 has no field 'text'; it has: body, id.*data\.text_field"),
        ('["text"]\n', r"bad\.jsonl:1 holds list, not an object"),
        ('{"text": 3}\n', r"bad\.jsonl:1: field 'text' holds int, not text"),
        (json.dumps({"text": "ab\ud800"}), r"bad\.jsonl:1: field 'text' holds half a surrogate pair \(character 2\)"),
        (b'{"text": "\xff"}', r"bad\.jsonl is not UTF-8 text \(byte 10\)"),
        ('{"text": "alone"}', r"only one document \(bad\.jsonl#1\)"),
        ('{"text": " "}', r"no document with text"),
        ("", r"no document with text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", content)
    with pytest.raises(UserError, match=message):
        split(Files(path=str(path)))


def test_bad_paths_and_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        split(Files(path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"no readable file under .*\.jsonl"):
        split(Files(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        split(Files(path=str(write(tmp_path / "empty.txt", " \n"))))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        split(Files(path=str(write(tmp_path / "latin.txt", b"caf\xe9"))))
    with pytest.raises(UserError, match=r"broken\.txt\.gz cannot be read"):
        split(Files(path=str(write(tmp_path / "broken.txt.gz", gzip.compress(b"a" * 99)[:-12]))))
    with pytest.raises(UserError, match=r"only one document"):
        split(Files(path=str(write(tmp_path / "short.txt", "too short to cut"))))


def test_a_dataset_folder_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    write(folder / "train.jsonl", "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(60)))
    write(folder / "validation.jsonl", '{"text": "held"}\n')
    train, validation = split(Datasets(name=str(folder), validation_split="validation"))
    assert len(train) == 60
    assert validation == [Document("validation#0", "held")]
    train, validation = split(Datasets(name=str(folder)))
    assert [document.name for document in validation] == [f"train#{n}" for n in range(60) if draw(f"train#{n}") < 0.05]
    with pytest.raises(UserError, match=r"has no column 'body'; it has: text"):
        split(Datasets(name=str(folder), text_field="body"))
    with pytest.raises(UserError, match=r"split tset"):
        split(Datasets(name=str(folder), train_split="tset"))


def test_the_slot_reads_settings() -> None:
    assert build(Holder, {"data": "stdlib"}).data == Stdlib()
    assert build(Holder, {"data": {"type": "files", "path": "a"}}).data == Files(path="a")
    with pytest.raises(UserError, match="Did you mean 'files'"):
        build(Holder, {"data": {"type": "file", "path": "a"}})
    with pytest.raises(UserError, match="validation_fraction"):
        build(Holder, {"data": {"type": "stdlib", "validation_fraction": 0}})
