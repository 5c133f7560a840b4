"""Documents as one stream of tokens, and the batches cut from it, with document masks and exact byte counts."""

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from moeforge.data.document import Document
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError

IGNORED = -100
"""Label of a target that doesn't count: ``cross_entropy``'s default ``ignore_index``."""
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Packed:
    """A token stream of N tokens from D documents; each is what its tokenizer starts documents with, then its text.

    What a model is to say after a text is the end token. For ours that is what the next document starts with, too.
    """

    ids: Tensor
    """[N] int32 tokens."""
    starts: Tensor
    """[D] int64 position of each document's first token; the first is 0."""
    byte_lengths: Tensor
    """[N] int32 UTF-8 bytes of text behind each token, 0 for what documents start with. They sum to all texts'."""
    domain: Tensor
    """[D] int64 number of each document's domain, in the order of the names given to ``pack``; 0 without names."""
    lead: Tensor
    """[S] int32 tokens that every document starts with; all after the first are given, never to be predicted."""
    end: Tensor
    """[] int32 the token that ends a document: the label in place of the next document's first token."""

    @property
    def num_tokens(self) -> int:
        """N, what documents start with included."""
        return len(self.ids)

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts: what bits per byte divides by."""
        return int(self.byte_lengths.sum())

    @cached_property
    def sizes(self) -> Tensor:
        """[D] int64 tokens of each document, what it starts with included."""
        return torch.diff(self.starts, append=torch.tensor([self.num_tokens]))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokens: equal exactly when the data and the tokenizer are."""
        return _digest(self.ids)

    @cached_property
    def domain_fingerprint(self) -> str:
        """sha256 of the documents' domains."""
        return _digest(self.domain)


def _digest(values: Tensor) -> str:
    values = values.contiguous()
    size = values.numel() * values.element_size()
    return hashlib.sha256((ctypes.c_char * size).from_address(values.data_ptr())).hexdigest()


def pack(documents: Sequence[Document], tokenizer: Tokenizer, domains: Sequence[str] = ()) -> Packed:
    """Encodes and joins ``documents``; ``domains`` are the names that their domains are numbered by.

    Raises UserError when no token comes of them, or one is of a domain that is not among the names.
    """
    lead = torch.tensor(tokenizer.start_ids, dtype=torch.int32)
    lead_bytes = torch.zeros_like(lead)
    ids: list[Tensor] = []
    lengths: list[Tensor] = []
    sizes: list[int] = []
    domain: list[int] = []
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        some = documents[first : first + _DOCUMENTS_AT_ONCE]
        texts = [document.text for document in some]
        for document, text, tokens in zip(some, texts, _encode(texts, tokenizer), strict=True):
            if len(tokens):  # a text may vanish, such as white space in a tokenizer that strips it
                ids += [lead, tokens]
                lengths += [lead_bytes, _byte_lengths(text, tokens, tokenizer)]
                sizes.append(len(lead) + len(tokens))
                domain.append(_number(document, domains))
    if not ids:
        raise UserError("the tokenizer made no token of the data: its documents are empty")
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    end = torch.tensor(tokenizer.eos_id, dtype=torch.int32)
    return Packed(torch.cat(ids), starts, torch.cat(lengths), torch.tensor(domain), lead, end)


def _number(document: Document, domains: Sequence[str]) -> int:
    if domains and document.domain not in domains:
        raise UserError(
            f"{document.name} is of domain '{document.domain}', this model knows {', '.join(domains)}: "
            "a domain is the first folder below data.path, or what data.domain_field names"
        )
    return domains.index(document.domain) if domains else 0


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[Tensor]:
    """[n] int32 tokens of each text; bytes go straight from memory, without a Python number for each."""
    if tokenizer.is_bytes:
        for text in texts:
            yield torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).int() if text else torch.empty(0)
        return
    for tokens in tokenizer.encode_batch(texts):
        yield torch.tensor(tokens, dtype=torch.int32)


def _byte_lengths(text: str, tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """[n] int32 bytes behind each token: from a table where that adds up, else by the tokenizer's offsets."""
    if tokenizer.is_bytes:
        return torch.ones_like(tokens)
    table = tokenizer.token_bytes
    if table is not None:
        own = [len(table[token]) for token in tokens.tolist()]
        if sum(own) == len(text.encode("utf-8")):
            return torch.tensor(own, dtype=torch.int32)
    return torch.tensor(tokenizer.byte_shares(text), dtype=torch.int32)


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens. A token may attend to earlier tokens of its row with the same ``document``."""

    input_ids: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64 next tokens; ``IGNORED`` in the padding of an evaluation's last row, and where it was given."""
    document: Tensor
    """[B, L] int32 number of the document within its row: 0, 1, ..."""
    position: Tensor
    """[B, L] int64 position within the document, from 0 at its start or at the start of the row."""
    domain: Tensor
    """[B, L] int64 number of the token's document's domain."""
    num_bytes: int
    """UTF-8 bytes of text that the targets stand for."""

    @property
    def known(self) -> dict[str, Tensor]:
        """What the tokens are known to be, by kind: for gates that look it up."""
        return {"domain": self.domain}

    @property
    def num_targets(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device."""
        return self.with_each(lambda tensor_BL: tensor_BL.to(device))

    def with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with every tensor changed; ``num_bytes`` stays."""
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)[:-1]})


class _Arrangement:
    """The documents of a Packed one after the other in some order, without moving a token."""

    def __init__(self, packed: Packed, order: Tensor) -> None:
        self.packed = packed
        self.sources = packed.starts[order]
        self.ends = packed.sizes[order].cumsum(0)
        self.begins = self.ends - packed.sizes[order]
        self.domain = packed.domain[order]

    def cut(self, first: Tensor, seq_len: int) -> Batch:
        """Rows of ``seq_len`` tokens and their next tokens, from the stream positions ``first`` [B]."""
        last = self.packed.num_tokens - 1
        column = torch.arange(seq_len + 1)
        place = first[:, None] + column
        beyond = place[:, 1:] > last
        place = place.clamp(max=last)
        rank = torch.searchsorted(self.ends, place, right=True)
        offset = place - self.begins[rank]
        source = self.sources[rank] + offset
        tokens, target = self.packed.ids[source].long(), offset[:, 1:]
        labels = torch.where(target == 0, self.packed.end.long(), tokens[:, 1:])
        given = (target > 0) & (target < len(self.packed.lead))
        return Batch(
            input_ids=tokens[:, :-1].contiguous(),
            labels=labels.masked_fill(beyond | given, IGNORED),
            document=(rank - rank[:, :1])[:, :-1].int(),
            position=torch.minimum(offset, column)[:, :-1].contiguous(),
            domain=self.domain[rank[:, :-1]],
            num_bytes=int(self.packed.byte_lengths[source[:, 1:]].masked_fill(beyond, 0).sum()),
        )


class Loader:
    """Endless training batches. Each epoch orders documents and windows anew, from ``seed`` and its number alone.

    An epoch is the stream in windows of ``seq_len`` tokens and their next tokens; what is left at its end, less than a
    window, falls elsewhere in the next epoch. Batches run on across epochs, so all have ``batch_size`` rows.
    """

    def __init__(self, packed: Packed, batch_size: int, seq_len: int, seed: int) -> None:
        """Raises UserError when ``packed`` is shorter than one window."""
        if packed.num_tokens < seq_len + 1:
            raise UserError(
                f"the training data has {packed.num_tokens} tokens, but one window needs {seq_len + 1}; "
                "use more text or a smaller seq_len"
            )
        self.packed, self.batch_size, self.seq_len, self.seed = packed, batch_size, seq_len, seed
        self.num_windows = (packed.num_tokens - 1) // seq_len
        self._start_epoch(0, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts: list[Batch] = []
        missing = self.batch_size
        while missing:
            if self._window == self.num_windows:
                self._start_epoch(self._epoch + 1, 0)
            windows = self._windows[self._window : self._window + missing]
            parts.append(self._arrangement.cut(windows * self.seq_len, self.seq_len))
            self._window += len(windows)
            missing -= len(windows)
        return parts[0] if len(parts) == 1 else _stacked(parts)

    def state(self) -> dict[str, int]:
        """Where the loader stands, as whole numbers: part of a checkpoint."""
        return {"seed": self.seed, "seq_len": self.seq_len, "epoch": self._epoch, "window": self._window}

    def load_state(self, state: dict[str, int]) -> None:
        """Goes on exactly where ``state`` was taken. Raises UserError when it belongs to other windows."""
        for name, here in (("seed", self.seed), ("seq_len", self.seq_len)):
            if state[name] != here:
                raise UserError(f"the checkpoint's data position is for {name}={state[name]}, this run has {here}")
        if not 0 <= state["window"] <= self.num_windows:
            raise UserError(f"the checkpoint stands at window {state['window']}, this data has {self.num_windows}")
        self._start_epoch(state["epoch"], state["window"])

    def _start_epoch(self, epoch: int, window: int) -> None:
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order = torch.randperm(len(self.packed.starts), generator=generator)
        self._arrangement = _Arrangement(self.packed, order)
        self._windows = torch.randperm(self.num_windows, generator=generator)
        self._epoch, self._window = epoch, window


def _stacked(parts: list[Batch]) -> Batch:
    names = [field.name for field in fields(Batch)[:-1]]
    rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Batch(**rows, num_bytes=sum(part.num_bytes for part in parts))


def evaluation_batches(packed: Packed, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Batches in order in which every token but the first and the given is a target once; the last row may be padded.

    With ``max_tokens``, as many whole windows as fit (at least one), spread evenly over the stream. Bits per byte are
    the summed nats / ln 2 / the summed ``num_bytes``.
    """
    arrangement = _Arrangement(packed, torch.arange(len(packed.starts)))
    available = -(-(packed.num_tokens - 1) // seq_len)
    count = available if max_tokens is None else min(available, max(1, max_tokens // seq_len))
    windows = torch.arange(count) * available // count
    for some in windows.split(batch_size):
        yield arrangement.cut(some * seq_len, seq_len)
