"""Tokenizers: every text comes back whole, alone, in a stream, and after saving."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moeforge.data.document import Document
from moeforge.data.packing import pack
from moeforge.data.tokenizers import BPE, Bytes, Tokenizer, TokenizerFile, train_or_open
from moeforge.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "torchtitan_test_tokenizer.json"
TEXTS = ["def f(x):\n    return x + 1\n" * 20, "Grüße, 世界! 👩‍🚀 " * 20, "the cat sat on the mat " * 30]
DOCUMENTS = [Document(str(number), text) for number, text in enumerate(TEXTS)]
BYTES = train_or_open(Bytes(), [])
BPE_300 = train_or_open(BPE(vocab_size=300), DOCUMENTS)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE_300], ids=["bytes", "bpe"])
any_text = st.text() | st.sampled_from([*TEXTS, "<|end|>", "a<|end|>b", "\ufffd", "\x00\r\n\t ", "👩‍🚀", ""])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(token) for token in ids) + stream.finish()


def metaspace() -> tokenizers.Tokenizer:
    """A tokenizer in SentencePiece's manner: not byte-level, and it loses unknown characters."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "</s>": 5}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<unk>", "</s>"])
    return inner


def test_bytes_are_the_bytes() -> None:
    assert BYTES.vocab_size == 257
    assert BYTES.eos_id == 256
    assert BYTES.is_bytes
    assert not BPE_300.is_bytes
    assert BYTES.encode("é\n") == [0xC3, 0xA9, 0x0A]


@settings(deadline=None, max_examples=40)
@given(any_text)
def test_bytes_fast_path_is_what_the_library_says(text: str) -> None:
    assert BYTES.inner.encode(text, add_special_tokens=False).ids == BYTES.encode(text)


def test_bpe_has_the_asked_size_and_merges() -> None:
    assert BPE_300.vocab_size == 300
    assert BPE_300.eos_id == 299
    assert len(BPE_300.encode(TEXTS[2])) < len(TEXTS[2]) / 2
    again = train_or_open(BPE(vocab_size=300), DOCUMENTS)
    assert again.inner.to_str() == BPE_300.inner.to_str()


def test_a_large_corpus_is_sampled_from_every_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeforge.data.tokenizers.BPE_SAMPLE_BYTES", 400)
    small = train_or_open(BPE(vocab_size=270), [Document("a", "aaab" * 1000), Document("b", "zzzy" * 1000)])
    assert len(small.encode("aaab" * 10)) < 40
    assert len(small.encode("zzzy" * 10)) < 40


@BOTH
@settings(deadline=None, max_examples=40)
@given(text=any_text)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text
    assert streamed(tokenizer, ids) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


@BOTH
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_ids_decode_as_the_library_decodes_them(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert tokenizer.decode(ids) == tokenizer.inner.decode(ids, skip_special_tokens=True)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert len(tokenizer.pieces(ids)) == len(ids)


def test_a_stream_holds_back_half_a_character() -> None:
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"


def test_pieces_show_parts_of_characters_and_special_tokens() -> None:
    assert BYTES.pieces([*"né".encode(), BYTES.eos_id]) == ["n", "\\xc3", "\\xa9", "<|end|>"]
    assert "".join(BPE_300.pieces(BPE_300.encode(TEXTS[0]))) == TEXTS[0]


@BOTH
@settings(deadline=None, max_examples=10)
@given(text=any_text)
def test_saved_and_opened_it_is_the_same(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    for path in (folder, folder / "tokenizer.json"):
        opened = train_or_open(TokenizerFile(path=str(path)), [])
        assert (opened.vocab_size, opened.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert opened.is_bytes == tokenizer.is_bytes
        assert opened.encode(text) == tokenizer.encode(text)


@pytest.mark.slow  # importing transformers
def test_transformers_opens_what_was_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    BPE_300.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == BPE_300.eos_id
    assert theirs(TEXTS[1], add_special_tokens=False).input_ids == BPE_300.encode(TEXTS[1])


def test_the_end_token_of_others_is_found(tmp_path: Path) -> None:
    inner = metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.open(tmp_path).eos_id == 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "b"}}))
    assert Tokenizer.open(tmp_path).eos_id == 3


def test_a_tokenizer_that_is_not_byte_level() -> None:
    tokenizer = Tokenizer(metaspace(), 5)
    assert tokenizer.token_bytes is None
    ids = tokenizer.encode("ab a")
    assert tokenizer.decode(ids) == "ab a"
    assert streamed(tokenizer, ids) == "ab a"
    assert tokenizer.pieces([2, 5]) == ["a", "</s>"]


def prepending() -> tokenizers.Tokenizer:
    """As ``metaspace``, in the manner of Llama 2: by normalizers."""
    inner = metaspace()
    inner.pre_tokenizer = pre_tokenizers.Sequence([])
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


@pytest.mark.parametrize("kind", [metaspace, prepending])
def test_what_goes_on_with_a_text_gets_no_space(kind: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(kind(), 5)
    first = tokenizer.encode("ab")
    assert first == [4, 3]
    for text in ("a", "ba", " a", "  b", "b a</s>", ""):
        ids = tokenizer.encode_inside(text)
        known = text.replace("</s>", "")  # spelled out it is text, of characters that this vocabulary lacks
        assert tokenizer.decode([*first, *ids]) == "ab" + known
        assert 5 not in ids
    assert BPE_300.encode_inside(" a") == BPE_300.encode(" a")


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="ab éz"))
def test_byte_shares_add_up(text: str) -> None:
    tokenizer = Tokenizer(metaspace(), 5)
    shares = tokenizer.byte_shares(text)
    assert len(shares) == len(tokenizer.encode(text))
    assert min(shares, default=0) >= 0
    assert sum(shares) == (len(text.encode()) if shares else 0)


def test_bad_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer.open(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.open(file)
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(file))
    with pytest.raises(UserError, match=r"no end-of-text token \(looked for .*</s>.*eos_token"):
        Tokenizer.open(file)
    (tmp_path / "tokenizer_config.json").write_text("not json")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.open(file)


def test_a_real_file_whose_vocabulary_has_no_space() -> None:
    if not SHARED.exists():
        pytest.skip(f"needs {SHARED}")
    tokenizer = Tokenizer.open(SHARED)
    assert tokenizer.pieces([tokenizer.eos_id]) == ["<|endoftext|>"]
    assert tokenizer.decode(tokenizer.encode("a b")) == "ab"
    packed = pack([Document("lossy", "def f(x):\n    return x\n")], tokenizer)
    assert packed.num_bytes == len("def f(x):\n    return x\n")
