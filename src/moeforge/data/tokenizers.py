"""Text to token ids and back: bytes, a BPE trained on the spot, or any ``tokenizer.json``, all of one class."""

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, trainers

from moeforge.config import Config, slot
from moeforge.data.document import Document
from moeforge.errors import UserError

END = "<|end|>"
"""End of document in the tokenizers that moeforge makes."""
END_NAMES = (
    *("<|endoftext|>", "<|end_of_text|>", END, "</s>", "<eos>", "<|eos|>", "[EOS]"),
    *("<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "[SEP]"),  # noqa: RUF001
)
"""Names of an end-of-text token, looked for in this order when no ``tokenizer_config.json`` says which it is."""
BPE_SAMPLE_BYTES = 8_000_000
"""A BPE is trained on at most this much of the training text, taken evenly from all of it."""


class Bytes(Config):
    """One token per UTF-8 byte, and one for the end of a document: 257 in all."""

    type: Literal["bytes"] = "bytes"


class BPE(Config):
    """Byte-level byte-pair encoding (arXiv:1508.07909), trained on the training documents."""

    type: Literal["bpe"] = "bpe"
    vocab_size: int = Field(1024, ge=257)
    """Number of tokens: 256 bytes, the end of a document, the rest merges."""


class TokenizerFile(Config):
    """A tokenizer that exists: the Hugging Face format."""

    type: Literal["file"] = "file"
    path: str
    """A ``tokenizer.json`` or the folder that holds one."""


TokenizerConfig = slot(Bytes, BPE, TokenizerFile)
AnyTokenizer = Bytes | BPE | TokenizerFile


def _alphabet() -> str:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's convention)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


ALPHABET = _alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


class Stream(Protocol):
    """Text of a growing sequence of tokens. All pushes and ``finish`` together give what ``decode`` gives."""

    def push(self, token: int) -> str:
        """The text that became certain with ``token``; empty while a character is still incomplete."""

    def finish(self) -> str:
        """What was held back, with replacement characters for what never became complete."""


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with a known end-of-document token.

    Special tokens spelled out in a text are encoded as the text they are: only ``eos_id`` itself ends a document. A
    model may write any of ``end_ids`` to end one; ``eos_id`` is always among them.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos_id: int, end_ids: Iterable[int] = ()) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.eos_id, self.end_ids = eos_id, frozenset((eos_id, *end_ids))
        self.is_bytes = inner.get_vocab_size(with_added_tokens=False) == 256 and all(
            inner.id_to_token(byte) == ALPHABET[byte] for byte in range(256)
        )

    @classmethod
    def open(cls, path: str | Path, end_ids: Iterable[int] = ()) -> Self:
        """The tokenizer in a ``tokenizer.json``, or in a folder that holds one. Raises UserError."""
        path = Path(path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"no tokenizer at {file}: {error}") from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error
        return cls(inner, _find_end(inner, file), end_ids)

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json``, and the ``tokenizer_config.json`` by which others know the end token."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.inner.to_str(pretty=True), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.inner.id_to_token(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }
        if self.start_ids != [self.eos_id]:
            settings["bos_token"] = self.inner.id_to_token(self.start_ids[0])
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @property
    def eos_token_id(self) -> int | list[int]:
        """As ``config.json`` has it: a list, ``eos_id`` first, where a text may end in several ways."""
        others = sorted(self.end_ids - {self.eos_id})
        return [self.eos_id, *others] if others else self.eos_id

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows an embedding needs."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without any special token."""
        return self.encode_batch([text])[0]

    def encode_inside(self, text: str) -> list[int]:
        """``encode`` of what goes on with a text: without the space that some tokenizers put before every text."""
        return self._inside.encode(text)

    @cached_property
    def _inside(self) -> Self:
        tree = json.loads(self.inner.to_str())
        parts = {name: _without_prefix(tree[name]) for name in ("normalizer", "pre_tokenizer")}
        if parts == {name: tree[name] for name in parts}:
            return self
        return type(self)(tokenizers.Tokenizer.from_str(json.dumps(tree | parts)), self.eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores unless ``TOKENIZERS_PARALLELISM=false``."""
        if self.is_bytes:
            return [list(text.encode("utf-8")) for text in texts]
        return [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def byte_shares(self, text: str) -> list[int]:
        """UTF-8 bytes of ``text`` behind each token of ``encode(text)``, for tokenizers that change the text.

        A token owns what follows the previous token's end up to its own; the last one owns the rest.
        """
        shares, start = [], 0
        for _, end in self.inner.encode(text, add_special_tokens=False).offsets:
            shares.append(len(text[start:end].encode("utf-8")))
            start = max(start, end)
        if shares:
            shares[-1] += len(text[start:].encode("utf-8"))
        return shares

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``. Special tokens vanish, bytes that are no UTF-8 become U+FFFD."""
        if self.token_bytes is not None:
            return b"".join(self.token_bytes[token] for token in ids).decode("utf-8", "replace")
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token on its own, for reports: its text, ``\\xNN`` for part of a character, a special token's name."""
        return [self._piece(token) for token in ids]

    def stream(self, after: Sequence[int] = ()) -> Stream:
        """A decoder for tokens that arrive one by one, ``after`` others: some tokenizers drop a text's first space."""
        return _ByteStream(self.token_bytes) if self.token_bytes is not None else _TextStream(self.inner, after)

    @cached_property
    def start_ids(self) -> list[int]:
        """What stands before the text of a document: what the tokenizer's template puts there, else ``eos_id``."""
        encoding = self.inner.encode("a", add_special_tokens=True)
        leading = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        return [token for token, _ in leading] or [self.eos_id]

    @cached_property
    def specials(self) -> set[int]:
        """Ids that stand for no text."""
        added = self.inner.get_added_tokens_decoder()
        return {token for token, entry in added.items() if entry.special} | {self.eos_id}

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of every id (none for special tokens), or None when the tokenizer isn't byte-level."""
        if not isinstance(self.inner.decoder, decoders.ByteLevel):
            return None
        table = [b""] * self.vocab_size
        for name, token in self.inner.get_vocab(with_added_tokens=True).items():
            if token not in self.specials:
                known = all(character in _BYTE_OF for character in name)
                table[token] = bytes(map(_BYTE_OF.__getitem__, name)) if known else name.encode("utf-8")
        return table

    def _piece(self, token: int) -> str:
        if token in self.specials:
            return self.inner.id_to_token(token) or ""
        if self.token_bytes is not None:
            return self.token_bytes[token].decode("utf-8", "backslashreplace")
        stream = self.stream(after=[token])  # as it reads inside a text, its space not dropped
        return stream.push(token) + stream.finish()


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer in JSON, or a sequence of them, that puts nothing before a text."""
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return {**part, "add_prefix_space": False}
        case {"type": "Sequence"}:
            name = "normalizers" if "normalizers" in part else "pretokenizers"
            kept = [_without_prefix(inner) for inner in part[name]]
            return {**part, name: [inner for inner in kept if inner is not None]}
    return part


class _ByteStream:
    """Exact for byte-level tokenizers: Python's incremental decoder holds back what may still become a character."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TextStream:
    """For all other tokenizers, where spaces depend on neighbours: the growth of the whole decoded text."""

    def __init__(self, inner: tokenizers.Tokenizer, after: Sequence[int]) -> None:
        self._inner = inner
        self._ids = [*after]
        self._shown = self._text()

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._grow(text)

    def finish(self) -> str:
        return self._grow(self._text())

    def _text(self) -> str:
        return self._inner.decode(self._ids, skip_special_tokens=True)

    def _grow(self, text: str) -> str:
        new, self._shown = text[len(self._shown) :], text
        return new


def train_or_open(config: AnyTokenizer, documents: Sequence[Document]) -> Tokenizer:
    """The tokenizer that ``config`` asks for; ``documents`` are the training documents. Raises UserError."""
    if isinstance(config, TokenizerFile):
        return Tokenizer.open(config.path)
    inner = _bytes() if isinstance(config, Bytes) else _train(config, documents)
    return Tokenizer(inner, inner.get_vocab(with_added_tokens=True)[END])


def _bytes() -> tokenizers.Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(ALPHABET)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return inner


def _train(config: BPE, documents: Sequence[Document]) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    # The end token is added after training, so that ids 0..255 are the byte alphabet and it comes last.
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - 1, initial_alphabet=list(ALPHABET), min_frequency=2, show_progress=False
    )
    inner.train_from_iterator(_sample(documents), trainer)
    inner.add_special_tokens([END])
    return inner


def _sample(documents: Sequence[Document]) -> Iterable[str]:
    """At most ``BPE_SAMPLE_BYTES`` characters: every document in full, or the same share from each one's start."""
    total = sum(len(document.text) for document in documents)
    share = min(1.0, BPE_SAMPLE_BYTES / max(total, 1))
    return (document.text[: round(len(document.text) * share)] for document in documents)


def _find_end(inner: tokenizers.Tokenizer, file: Path) -> int:
    """The id of the end-of-text token: as ``tokenizer_config.json`` says, else the first of ``END_NAMES``."""
    beside = file.with_name("tokenizer_config.json")
    names = [*_named_end(beside), *END_NAMES] if beside.exists() else END_NAMES
    for name in names:
        token = inner.token_to_id(name)
        if token is not None:
            return token
    raise UserError(
        f"{file} has no end-of-text token (looked for {', '.join(END_NAMES)}); "
        f'name it in {beside.name} beside it, as {{"eos_token": "..."}}'
    )


def _named_end(settings: Path) -> list[str]:
    try:
        end = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{settings} cannot be read: {error}") from error
    name = end.get("content") if isinstance(end, dict) else end
    return [name] if isinstance(name, str) else []
