"""Where text comes from: the standard library, local files, or a Hugging Face dataset, split by a fixed hash."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from moeforge.config import Config, slot
from moeforge.data import files, stdlib
from moeforge.data.document import Document, draw
from moeforge.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


class Source(Config):
    """What all corpora share: documents, and a number per document that decides training or validation."""

    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents that is held out, chosen by a fixed hash of the document's name."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, always in the same order."""

    def draw(self, name: str) -> float:
        """A fixed number in [0, 1) for a document; below ``validation_fraction`` it is held out."""
        return draw(name)


class Stdlib(Source):
    """Sources and documentation topics of the running Python's standard library. Needs no download."""

    type: Literal["stdlib"] = "stdlib"

    def documents(self) -> Iterator[Document]:
        return stdlib.documents()

    def draw(self, name: str) -> float:
        """By module, so that the files of one package never straddle the split."""
        return draw(stdlib.SALT + stdlib.module(name))


class Files(Source):
    """Local text, JSON lines or parquet: files, or folders that are searched for known suffixes."""

    type: Literal["files"] = "files"
    path: str | list[str]
    """A file, a folder, or a list of them."""
    text_field: str = "text"
    """Field of a JSON line, or column of a parquet file, that holds the text."""
    domain_field: str | None = None
    """The one that names the text's domain; null: a document's domain is the first folder below ``path``."""

    def documents(self) -> Iterator[Document]:
        paths = [self.path] if isinstance(self.path, str) else self.path
        return files.documents(paths, self.text_field, self.domain_field)


class Datasets(Source):
    """A dataset by its Hugging Face name, through the ``datasets`` library."""

    type: Literal["datasets"] = "datasets"
    name: str
    """Name on the Hub, or the path of a dataset folder."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    train_split: str = "train"
    """The split to train on."""
    validation_split: str | None = None
    """The split to validate on; without it, a fixed part of ``train_split`` is held out."""
    text_field: str = "text"
    """The column that holds the text."""
    domain_field: str | None = None
    """The column that names its domain."""

    def documents(self) -> Iterator[Document]:
        for split in filter(None, (self.train_split, self.validation_split)):
            rows = self._load(split)
            for column in filter(None, (self.text_field, self.domain_field)):
                if column not in rows.column_names:
                    columns = ", ".join(rows.column_names)
                    raise UserError(f"dataset {self.name} ({split}) has no column '{column}'; it has: {columns}")
            domains = rows[self.domain_field] if self.domain_field else itertools.repeat("")
            for number, (text, domain) in enumerate(zip(rows[self.text_field], domains, strict=False)):
                where = f"dataset {self.name}, {split} row {number}"
                yield Document(f"{split}#{number}", files.checked(text, where), files.checked(domain, where))

    def draw(self, name: str) -> float:
        if self.validation_split is None:
            return draw(name)
        return 0.0 if name.rpartition("#")[0] == self.validation_split else 1.0

    def _load(self, split: str) -> "Dataset":
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise UserError("data.type=datasets needs one more package: pip install 'moeforge[data]'") from error
        try:
            return load_dataset(self.name, self.subset, split=split)
        except (OSError, ValueError) as error:
            raise UserError(f"dataset {self.name}, split {split}: {' '.join(str(error).split())}") from error


Corpus = slot(Stdlib, Files, Datasets)


def split(corpus: Source) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, both in corpus order. Documents without text are left out.

    At least one document is held out: the one with the lowest draw, when none falls below the fraction.
    Raises UserError when there is nothing left for either side.
    """
    found = [document for document in corpus.documents() if document.text.strip()]
    if len(found) < 2:
        count = "no document" if not found else f"only one document ({found[0].name})"
        raise UserError(f"the {_described(corpus)} has {count} with text; training and validation need one each")
    draws = [corpus.draw(document.name) for document in found]
    cut = max(corpus.validation_fraction, min(draws))
    held = [number < corpus.validation_fraction or number == cut for number in draws]
    train = [document for document, out in zip(found, held, strict=True) if not out]
    validation = [document for document, out in zip(found, held, strict=True) if out]
    if not train:
        raise UserError(f"the {_described(corpus)} leaves no document to train on; lower data.validation_fraction")
    return train, validation


def _described(corpus: Source) -> str:
    settings = corpus.model_dump(exclude={"type"}, exclude_defaults=True)
    return f"corpus {getattr(corpus, 'type', type(corpus).__name__)} {settings or ''}".rstrip()
