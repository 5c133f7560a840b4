"""From a corpus and a tokenizer's settings to packed training and validation data, in one call."""

from dataclasses import dataclass

from moeforge.data import cache
from moeforge.data.corpora import Source, split
from moeforge.data.packing import Packed, pack
from moeforge.data.tokenizers import AnyTokenizer, Bytes, Tokenizer, TokenizerFile, train_or_open


@dataclass(frozen=True)
class TextData:
    """What a training run or an evaluation needs of text."""

    train: Packed
    validation: Packed
    tokenizer: Tokenizer
    domains: tuple[str, ...] = ("",)
    """Names of the documents' domains, sorted: ``Packed.domain`` numbers them."""


def prepare(corpus: Source, tokenizer: AnyTokenizer | Tokenizer) -> TextData:
    """Splits ``corpus``, makes the tokenizer (or takes the one given, as a resumed run does), and packs both parts.

    All but bytes, which are quick, are kept in the cache. Raises UserError for data or a tokenizer that can't be used.
    """
    train, validation = split(corpus)
    domains = tuple(sorted({document.domain for document in [*train, *validation]}))
    if isinstance(tokenizer, TokenizerFile | Bytes):
        tokenizer = train_or_open(tokenizer, train)
    if isinstance(tokenizer, Tokenizer) and tokenizer.is_bytes:
        return TextData(pack(train, tokenizer, domains), pack(validation, tokenizer, domains), tokenizer, domains)
    kind = f"{tokenizer.eos_id} {tokenizer.inner.to_str()}" if isinstance(tokenizer, Tokenizer) else repr(tokenizer)
    texts = ([text for document in part for text in (document.domain, document.text)] for part in (train, validation))
    folder = cache.entry_folder(kind, texts)
    entry = cache.load(folder)
    if entry is None:
        ready = tokenizer if isinstance(tokenizer, Tokenizer) else train_or_open(tokenizer, train)
        entry = pack(train, ready, domains), pack(validation, ready, domains), ready
        cache.store(folder, entry)
    return TextData(*entry, domains)
