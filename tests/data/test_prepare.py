"""From settings to packed data, with and without the cache."""

import json
from pathlib import Path

import pytest
import torch

from moeforge.data import cache
from moeforge.data.corpora import Files, split
from moeforge.data.packing import Packed
from moeforge.data.prepare import TextData, prepare
from moeforge.data.tokenizers import BPE, Bytes, TokenizerFile


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the cat sat on the naïve mat\n\n" * 2000, encoding="utf-8")
    return Files(path=str(tmp_path / "text.txt"))


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("packed/*"))


def assert_same(one: TextData, other: TextData) -> None:
    for part in ("train", "validation"):
        mine: Packed = getattr(one, part)
        theirs: Packed = getattr(other, part)
        assert mine.fingerprint == theirs.fingerprint
        assert torch.equal(mine.starts, theirs.starts)
        assert torch.equal(mine.byte_lengths, theirs.byte_lengths)
        assert torch.equal(mine.domain, theirs.domain)
    assert one.domains == other.domains
    assert one.tokenizer.inner.to_str() == other.tokenizer.inner.to_str()
    assert one.tokenizer.eos_id == other.tokenizer.eos_id


def test_bytes_are_packed_without_a_cache(corpus: Files, tmp_path: Path) -> None:
    data = prepare(corpus, Bytes())
    train, validation = split(corpus)
    assert data.train.num_bytes == sum(len(document.text.encode()) for document in train)
    assert data.validation.num_bytes == sum(len(document.text.encode()) for document in validation)
    assert not entries(tmp_path)


def test_bpe_comes_back_from_the_cache(corpus: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(corpus, BPE(vocab_size=280))
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr("moeforge.data.prepare.pack", None)  # whatever packs now, fails
    assert_same(made, prepare(corpus, BPE(vocab_size=280)))
    with pytest.raises(TypeError):
        prepare(corpus, BPE(vocab_size=281))


def test_an_opened_tokenizer_is_used_as_it_is(corpus: Files, tmp_path: Path) -> None:
    made = prepare(corpus, BPE(vocab_size=280))
    made.tokenizer.save(tmp_path / "saved")
    assert_same(made, prepare(corpus, made.tokenizer))
    assert_same(made, prepare(corpus, TokenizerFile(path=str(tmp_path / "saved"))))


def test_a_damaged_entry_is_made_again(corpus: Files, tmp_path: Path) -> None:
    made = prepare(corpus, BPE(vocab_size=280))
    (entry,) = entries(tmp_path)
    file = entry / "train.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert cache.load(entry) is None
    assert_same(made, prepare(corpus, BPE(vocab_size=280)))
    assert cache.load(entry) is not None
    assert entries(tmp_path) == [entry]


def test_a_cache_that_cannot_be_written_only_warns(
    corpus: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match="not cached"):
        assert prepare(corpus, BPE(vocab_size=280)).train.num_tokens


def test_domains_are_numbered_alike_in_both_parts_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path / "cache"))
    for domain in ("verse", "law"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "text" / domain / f"{number}.txt").write_text(f"{domain} the cat sat on the mat " * 9)
    corpus = Files(path=str(tmp_path / "text"), validation_fraction=0.4)
    made = prepare(corpus, BPE(vocab_size=270))
    assert made.domains == ("law", "verse") and len(entries(tmp_path)) == 1
    for part in (made.train, made.validation):
        assert part.domain.unique().tolist() == [0, 1]
        texts = [made.tokenizer.decode(ids[1:].tolist()) for ids in part.ids.split(part.sizes.tolist())]
        assert [text.split()[0] for text in texts] == [made.domains[domain] for domain in part.domain]
    assert_same(made, prepare(corpus, BPE(vocab_size=270)))
    assert len(entries(tmp_path)) == 1


def test_equal_texts_of_other_domains_are_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"the cat sat on mat {n} " * 9, "kind": "ab"[n % 2], "mood": "ab"[n % 3 == 0]} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [
        prepare(Files(path=str(tmp_path / "rows.jsonl"), domain_field=field), BPE(vocab_size=270))
        for field in ("kind", "mood", None)
    ]
    assert [data.domains for data in found] == [("a", "b"), ("a", "b"), ("",)]
    assert len(entries(tmp_path)) == 3 and len({data.train.fingerprint for data in found}) == 1
    assert len({data.train.domain_fingerprint for data in found}) == 3


def test_other_texts_are_another_entry(corpus: Files) -> None:
    assert cache.entry_folder("t", [["a", "b"], ["c"]]) == cache.entry_folder("t", [["a", "b"], ["c"]])
    folders = {
        cache.entry_folder("t", [["a", "b"], ["c"]]),
        cache.entry_folder("t", [["a"], ["b", "c"]]),
        cache.entry_folder("t", [["ab"], ["c"]]),
        cache.entry_folder("u", [["a", "b"], ["c"]]),
    }
    assert len(folders) == 4
