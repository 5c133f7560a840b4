"""Packing: masks against a plain loop, every target once, bytes that add up, and resuming bit for bit."""

import json
from dataclasses import fields

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from moeforge.data.document import Document
from moeforge.data.packing import IGNORED, Batch, Loader, Packed, evaluation_batches, pack
from moeforge.data.tokenizers import BPE, Bytes, Tokenizer, train_or_open
from moeforge.errors import UserError

BYTES = train_or_open(Bytes(), [])
BPE_280 = train_or_open(BPE(vocab_size=280), [Document("a", "naïve cats 👍 sat on mats " * 40)])


def word_tokenizer() -> Tokenizer:
    """Lower-cases, drops white space and knows two words: its tokens don't spell the text."""
    inner = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "naïve": 2, "</s>": 3}, "[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(inner, 3)


TOKENIZERS = {"bytes": BYTES, "bpe": BPE_280, "words": word_tokenizer()}
texts = st.lists(st.text(alphabet="Cat naïve👍\n", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=8)


def packed_of(*some: str, tokenizer: Tokenizer = BYTES) -> Packed:
    return pack([Document(str(number), text) for number, text in enumerate(some)], tokenizer)


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch)[:-1]:
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
    assert one.num_bytes == other.num_bytes


def masks_by_loop(ids: list[int], end: int) -> tuple[list[int], list[int]]:
    """Document number and position of each token of one row."""
    numbers, positions, number, position = [], [], 0, -1
    for column, token in enumerate(ids):
        started = token == end and column > 0
        number, position = (number + 1, 0) if started else (number, position + 1)
        numbers.append(number)
        positions.append(position)
    return numbers, positions


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(some=texts)
def test_a_stream_of_documents(name: str, some: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    packed = packed_of(*some, tokenizer=tokenizer)
    expected = [token for text in some for token in (tokenizer.eos_id, *tokenizer.encode(text))]
    assert packed.ids.tolist() == expected
    assert packed.starts.tolist() == [place for place, token in enumerate(expected) if token == tokenizer.eos_id]
    assert packed.num_bytes == sum(len(text.encode()) for text in some)
    assert not packed.byte_lengths[packed.starts].any()
    assert packed.byte_lengths.min() >= 0
    assert (packed.ids.dtype, packed.byte_lengths.dtype) == (torch.int32, torch.int32)


def starting(*names: str) -> Tokenizer:
    """Bytes with an end token and special tokens that its template puts before every text."""
    inner = tokenizers.Tokenizer.from_str(BYTES.inner.to_str())
    inner.add_special_tokens(list(names))
    specials = [(name, inner.token_to_id(name)) for name in names]
    inner.post_processor = TemplateProcessing(single=" ".join((*names, "$A")), special_tokens=specials)
    return Tokenizer(inner, BYTES.eos_id)


@pytest.mark.parametrize("names", [("<s>",), ("<s>", "<t>", "<u>")])
@settings(deadline=None, max_examples=20)
@given(some=texts, seq_len=st.integers(1, 24))
def test_documents_start_as_the_tokenizer_says_and_end_with_the_end(names, some: list[str], seq_len: int) -> None:
    tokenizer = starting(*names)
    packed = packed_of(*some, tokenizer=tokenizer)
    inputs, labels = [], []
    for text in some:
        ids = tokenizer.inner.encode(text).ids
        assert ids[: len(names)] == tokenizer.start_ids == list(range(257, 257 + len(names)))
        inputs += ids
        labels += [IGNORED] * (len(names) - 1) + ids[len(names) :] + [tokenizer.eos_id]
    batches = list(evaluation_batches(packed, 3, seq_len))
    for seen, wanted in (("input_ids", inputs), ("labels", labels)):
        flat = torch.cat([getattr(batch, seen).flatten() for batch in batches])
        assert flat[: len(inputs) - 1].tolist() == wanted[:-1]
    assert packed.num_bytes == sum(len(text.encode()) for text in some)


def test_byte_lengths_are_those_of_the_tokens() -> None:
    text = "naïve cats 👍"
    packed = packed_of(text, tokenizer=BPE_280)
    assert BPE_280.token_bytes is not None
    spelled = [BPE_280.token_bytes[token] for token in packed.ids.tolist()]
    assert packed.byte_lengths.tolist() == [len(piece) for piece in spelled]
    assert b"".join(spelled) == text.encode()


def test_texts_that_make_no_token() -> None:
    packed = packed_of("cat", "  ", "cat", tokenizer=word_tokenizer())
    assert packed.ids.tolist() == [3, 1, 3, 1]
    assert packed.num_bytes == 6
    with pytest.raises(UserError, match="no token of the data"):
        packed_of(" ", tokenizer=word_tokenizer())
    with pytest.raises(UserError, match="no token of the data"):
        packed_of("", tokenizer=BYTES)


def test_every_token_knows_its_documents_domain() -> None:
    names = ("prose", "verse")
    documents = [Document(str(number), chr(97 + number) * 5, names[number % 3 == 0]) for number in range(9)]
    packed = pack(documents, BYTES, names)
    assert packed.domain.tolist() == [int(number % 3 == 0) for number in range(9)]
    batches = [*evaluation_batches(packed, 2, 7), next(Loader(packed, 3, 7, seed=1))]
    for batch in batches:
        assert batch.domain.shape == batch.input_ids.shape and batch.domain.dtype == torch.int64
        for ids, domains in zip(batch.input_ids.tolist(), batch.domain.tolist(), strict=True):
            letters = [(token, domain) for token, domain in zip(ids, domains, strict=True) if token != BYTES.eos_id]
            assert all(domain == ((token - 97) % 3 == 0) for token, domain in letters)
            following = zip(ids, domains, ids[1:], domains[1:], strict=False)
            assert all(a == b for token, a, after, b in following if token == BYTES.eos_id and after != token)
    assert not packed_of("a", "b").domain.any()
    with pytest.raises(UserError, match="1 is of domain 'prose', this model knows verse, law"):
        pack(documents[1:], BYTES, ("verse", "law"))


def test_domains_have_a_fingerprint_of_their_own() -> None:
    one, other = (pack([Document("a", "x", d), Document("b", "y", "p")], BYTES, ("p", "q")) for d in "pq")
    assert one.fingerprint == other.fingerprint and one.domain_fingerprint != other.domain_fingerprint


def test_the_fingerprint_tells_data_apart() -> None:
    assert packed_of("one", "two").fingerprint == packed_of("one", "two").fingerprint
    assert packed_of("one", "two").fingerprint != packed_of("two", "one").fingerprint


@settings(deadline=None, max_examples=40)
@given(some=texts, batch_size=st.integers(1, 4), seq_len=st.integers(1, 24))
def test_evaluation_covers_every_target_once(some: list[str], batch_size: int, seq_len: int) -> None:
    packed = packed_of(*some)
    inputs, labels = [], []
    for batch in evaluation_batches(packed, batch_size, seq_len):
        assert batch.input_ids.shape == batch.labels.shape == batch.document.shape == batch.position.shape
        assert batch.input_ids.shape[0] <= batch_size
        counts = batch.labels != IGNORED
        assert batch.num_targets == int(counts.sum())
        inputs += batch.input_ids[counts].tolist()
        labels += batch.labels[counts].tolist()
    stream = packed.ids.tolist()
    assert inputs == stream[:-1]
    assert labels == stream[1:]
    assert sum(batch.num_bytes for batch in evaluation_batches(packed, batch_size, seq_len)) == packed.num_bytes


@settings(deadline=None, max_examples=40)
@given(some=texts, seq_len=st.integers(1, 24), seed=st.integers(0, 9))
def test_masks_equal_a_plain_loop(some: list[str], seq_len: int, seed: int) -> None:
    packed = packed_of(*some)
    batches = list(evaluation_batches(packed, 3, seq_len))
    if packed.num_tokens > seq_len:
        batches += [next(Loader(packed, 3, seq_len, seed))]
    for batch in batches:
        assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert (batch.document.dtype, batch.position.dtype) == (torch.int32, torch.int64)
        for row in range(len(batch.input_ids)):
            real = int((batch.labels[row] != IGNORED).sum())
            numbers, positions = masks_by_loop(batch.input_ids[row, :real].tolist(), BYTES.eos_id)
            assert batch.document[row, :real].tolist() == numbers
            assert batch.position[row, :real].tolist() == positions


def test_limited_evaluation_is_spread_over_the_stream() -> None:
    packed = packed_of("abcdefghijklmnopqrstuvwxyz" * 10)
    rows = torch.cat([batch.input_ids for batch in evaluation_batches(packed, 2, 10, max_tokens=65)])
    assert rows.shape == (6, 10)
    whole = torch.cat([batch.input_ids for batch in evaluation_batches(packed, 2, 10)])
    assert torch.equal(rows, whole[torch.tensor([0, 4, 8, 13, 17, 21])])
    assert sum(len(batch.input_ids) for batch in evaluation_batches(packed, 2, 10, max_tokens=3)) == 1


@settings(deadline=None, max_examples=40)
@given(some=texts, seq_len=st.integers(1, 12), seed=st.integers(0, 2**63))
def test_an_epoch_shows_whole_windows_of_the_shuffled_documents(some: list[str], seq_len: int, seed: int) -> None:
    packed = packed_of(*some)
    if packed.num_tokens <= seq_len:
        return
    loader = Loader(packed, 1, seq_len, seed)
    rows = [next(loader) for _ in range(loader.num_windows)]
    pairs = sorted((tuple(row.input_ids[0].tolist()), row.labels[0].tolist()[-1]) for row in rows)
    assert all(row.labels[0].tolist()[:-1] == row.input_ids[0].tolist()[1:] for row in rows)
    seen = sorted(token for ids, _ in pairs for token in ids)
    stream = sorted(packed.ids.tolist())
    assert len(seen) == (packed.num_tokens - 1) // seq_len * seq_len
    assert all(seen.count(token) <= stream.count(token) for token in set(seen))


def test_epochs_differ_and_shuffle_documents_and_windows() -> None:
    packed = packed_of(*[chr(97 + number) * 9 for number in range(12)])
    loader = Loader(packed, 7, 17, seed=1)
    assert loader.num_windows == 7
    first, second = next(loader), next(loader)
    assert not torch.equal(first.input_ids, second.input_ids)
    followed = {
        (int(row[place - 1]), int(row[place + 1]))
        for batch in (first, second)
        for row in batch.input_ids
        for place in range(1, 16)
        if row[place] == BYTES.eos_id
    }
    assert any(after - before != 1 for before, after in followed)
    other = next(Loader(packed, 7, 17, seed=2))
    assert not torch.equal(first.input_ids, other.input_ids)


@settings(deadline=None, max_examples=40)
@given(
    some=texts,
    batch_size=st.integers(1, 5),
    seq_len=st.integers(1, 12),
    before=st.integers(0, 9),
    seed=st.integers(0, 5),
)
def test_resuming_is_bit_exact(some: list[str], batch_size: int, seq_len: int, before: int, seed: int) -> None:
    packed = packed_of(*some)
    if packed.num_tokens <= seq_len:
        return
    loader = Loader(packed, batch_size, seq_len, seed)
    for _ in range(before):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    resumed = Loader(packed_of(*some), batch_size, seq_len, seed)
    resumed.load_state(state)
    for _ in range(4):
        batch = next(loader)
        assert batch.input_ids.shape == (batch_size, seq_len)
        assert_equal(batch, next(resumed))
    assert loader.state() == resumed.state()


def test_the_loader_refuses_what_does_not_fit() -> None:
    packed = packed_of("abc")
    with pytest.raises(UserError, match="has 4 tokens, but one window needs 5"):
        Loader(packed, 1, 4, 0)
    state = Loader(packed, 1, 3, 0).state()
    with pytest.raises(UserError, match="seed=0, this run has 1"):
        Loader(packed, 1, 3, 1).load_state(state)
    with pytest.raises(UserError, match="seq_len=3, this run has 2"):
        Loader(packed, 1, 2, 0).load_state(state)
    with pytest.raises(UserError, match="window 9, this data has 1"):
        Loader(packed, 1, 3, 0).load_state(state | {"window": 9})


def test_a_batch_moves_whole() -> None:
    batch = next(Loader(packed_of("abcdef"), 2, 3, 0))
    moved = batch.to("meta")
    assert {getattr(moved, field.name).device.type for field in fields(Batch)[:-1]} == {"meta"}
    assert moved.num_bytes == batch.num_bytes
