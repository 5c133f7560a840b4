"""Files of llama2.c: the same encoding and the same logits as its own few hundred lines of C, here in plain Python."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.llama2c import load
from tests.hub import llama2c as twin

PIECES = ["b", "a", " ", "aa", "ab", "aba", " a", "aaa", "bb", "é", " ab"]
SIZES = {"tied": (16, 24, 2, 4, 2, 270, 32), "untied": (16, 24, 2, 4, 2, -270, 32)}


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    """A real model, trained by the author of llama2.c on TinyStories."""
    return shared_data / "weights" / "stories260K.bin"


def write(folder: Path) -> Path:
    """Random weights with their tokenizer beside."""
    twin.write_tokenizer(folder / "tok270.bin", [(-float(rank), piece) for rank, piece in enumerate(PIECES)])
    return twin.write_weights(folder / "small.bin", SIZES["tied"], twin.random_tensors(SIZES["tied"]))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """To be changed by the test."""
    return write(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of ``PIECES``."""
    return load(write(tmp_path_factory.mktemp("small")))[1]


@pytest.mark.parametrize("kind", SIZES)
def test_logits_are_those_of_run_c(small, kind):
    sizes = SIZES[kind]
    tensors = [3 * tensor for tensor in twin.random_tensors(sizes)]
    model, _ = load(twin.write_weights(small, sizes, tensors))
    ids = torch.randint(0, 270, (12,))
    torch.testing.assert_close(model(ids[None]).logits[0], twin.logits(sizes, tensors, ids.tolist()))
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors) - 2 * 32 * 2
    assert not model.training


@given(st.text("ab é€", max_size=30))
@example("")
def test_any_text_is_encoded_as_there(tokenizer, text):
    assert tokenizer.encode(text) == twin.encode(twin.FIXED + [(-float(r), p) for r, p in enumerate(PIECES)], text)


def test_real_text_is_encoded_as_there_and_comes_back(stories, shared_data):
    _, tokenizer = load(stories)
    pieces = twin.read_pieces(stories.with_name("tok512.bin"))
    book = (shared_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    for text in [*book[:20_000].split("\n\n"), *book.splitlines()[:200], "Grüße, 世界! 👩‍🚀", "a  b\t\\n\n", "<s></s>"]:
        ids = tokenizer.encode(text)
        assert ids == twin.encode(pieces, text)
        assert tokenizer.decode([*tokenizer.start_ids, *ids]) == text
    assert (tokenizer.start_ids, tokenizer.eos_id) == ([1], 2)


def test_its_text_streams_with_the_spaces_it_has(tokenizer):
    ids = tokenizer.encode("ab é€ a")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids) == "ab é€ a"
    stream = tokenizer.stream(ids)
    assert [stream.push(token) for token in ids] == [" ab", " ", "é", "", "", "€", " a"]
    assert tokenizer.pieces(ids) == [" ab", " ", "é", "\ufffd", "\ufffd", "\ufffd", " a"]


BAD = {
    "cut short": (lambda data: data[:-4], r"has 33,496 bytes, but the sizes that it begins with ask for 33,500"),
    "too long": (lambda data: data + b"1234", "bytes, but the sizes"),
    "later format": (lambda data: b"24ka" + data[4:], "later format of llama2.c: export it with --version 0"),
    "text": (lambda data: b"just some text, and some more of it", "does not begin with the sizes of a model"),
    "empty": (lambda data: b"", "does not begin with the sizes of a model"),
    "sizes": (lambda data: data[:12] + bytes([5]) + data[13:], "does not begin with the sizes of a model"),
}


@pytest.mark.parametrize("what", BAD)
def test_weights_that_are_none(small, what):
    change, message = BAD[what]
    small.write_bytes(change(small.read_bytes()))
    with pytest.raises(UserError, match=message):
        load(small)


BAD_TOKENIZERS = {
    "cut short": (lambda data: data[:-1], "is no tokenizer of llama2.c, or is cut short"),
    "negative": (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "or is cut short"),
    "no text": (lambda data: data[:12] + b"\xff" + data[13:], "or is cut short"),
    "no bytes": (lambda data: data.replace(b"<0x41>", b"<0x42>"), "ids 3 to 258 are not the bytes, or a piece comes"),
    "another size": (lambda data: data[:-11], "the model has 270 tokens, its tokenizer 269"),
}


@pytest.mark.parametrize("what", BAD_TOKENIZERS)
def test_tokenizers_that_are_none(small, what):
    change, message = BAD_TOKENIZERS[what]
    file = small.with_name("tok270.bin")
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        load(small)


def test_a_tokenizer_is_found_by_either_name_or_named(small, tmp_path):
    found = small.with_name("tok270.bin")
    found = found.rename(tmp_path / "tokenizer.bin")
    assert load(small)[1].vocab_size == 270
    found = found.rename(tmp_path / "elsewhere.bin")
    assert load(small, found)[1].vocab_size == 270
    with pytest.raises(UserError, match=r"none of tok270.bin, tokenizer.bin lies beside it; name it with --tokenizer"):
        load(small)
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "nowhere.bin")
