"""``load`` and ``save_pretrained``: a folder of a public family becomes our decoder, and goes home unchanged."""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.config import Tree
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.bridge import REFUSED
from moeforge.hub.card import card
from moeforge.hub.families import FAMILIES, Family
from moeforge.hub.layout import Piece, plan
from moeforge.hub.packed import PackedExperts
from moeforge.hub.shards import MAX_SHARD_SIZE, Shards, Source, write
from moeforge.hub.whole import write_whole
from moeforge.kernels.allocator import ask_for_huge_pages
from moeforge.models import Decoder, ModelConfig
from moeforge.models.init import without_memory
from moeforge.models.weights import check_whole

CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    *("generation_config.json", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Files beside the weights that a saved folder gets from the one that was opened."""

READERS = 2
"""Threads that copy weights: what takes the time is memory that is touched for the first time."""
Settle = Callable[[nn.Module], None]
"""Called with each layer as soon as its weights are there, before those of the next are read."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Origin:
    """Where a decoder came from, and so how it goes home."""

    family: Family
    config_json: Tree
    """The fields as they were read."""
    folder: Path
    shards: Shards | None = None
    unused: tuple[str, ...] = ()
    """Tensors of ``shards`` that no logit depends on; they are copied when the model is saved."""


class Pretrained(Decoder):
    """A decoder that was opened from a folder of a public family, or is to be saved as one."""

    def __init__(self, config: ModelConfig, origin: Origin) -> None:
        super().__init__(config)
        self.origin = origin

    def save_pretrained(
        self, folder: str | Path, max_shard_size: int | str = MAX_SHARD_SIZE, tokenizer: Tokenizer | None = None
    ) -> None:
        """Writes a folder that transformers opens as its own: config.json with the fields that came in, safetensors of
        at most ``max_shard_size`` bytes each (``"5GB"`` is understood), tokenizer and generation config as they were.

        ``tokenizer`` is for an origin without one. Raises UserError when the settings have changed to what the family
        cannot say, and when it cannot be written.
        """
        save_as(self, Path(folder), self.origin.family, self.origin, tokenizer, max_shard_size)


def save_as(
    model: Decoder,
    folder: Path,
    family: Family,
    origin: Origin | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes any decoder as a folder of ``family``; ``origin`` says which fields, files and tensors go along."""
    write_whole(folder, contents(model, folder.name, family, origin, tokenizer, max_shard_size))


def contents(
    model: Decoder,
    name: str,
    family: Family,
    origin: Origin | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    *,
    experts: PackedExperts | None = None,
) -> Callable[[Path], None]:
    """What fills a folder as ``save_as`` does; ``name`` is the model's. ``experts``, where given, stand for theirs."""
    if experts is None:
        check_whole(model)
    config_json = family.write(model.config, origin.config_json if origin else None)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config_json["torch_dtype" if "torch_dtype" in config_json else "dtype"] = dtype
    if tokenizer is not None:
        config_json.setdefault("eos_token_id", tokenizer.eos_token_id)
        if tokenizer.start_ids != [tokenizer.eos_id]:
            config_json.setdefault("bos_token_id", tokenizer.start_ids[0])
    tensors = model.state_dict()
    pieces = {piece.name: piece for piece in plan(model, family.names)}
    sizes = {name: piece.of_ours(tensors[piece.parameter]).nbytes for name, piece in pieces.items()}
    kept = origin.shards if origin else None
    sizes |= {name: kept.nbytes(name) for name in origin.unused} if origin and kept else {}
    if experts is not None:
        config_json["quantization_config"] = experts.settings
        sizes = {name: size for name, size in sizes.items() if name not in experts.of}
        sizes |= {name: tensor.nbytes for name, tensor in experts.tensors.items()}

    def get(name: str) -> Tensor:
        if experts is not None and name in experts.tensors:
            return experts.tensors[name]
        if name in pieces:
            return pieces[name].as_theirs(tensors[pieces[name].parameter])
        assert kept is not None
        return kept.get(name)

    def fill(fresh: Path) -> None:
        write(fresh, sizes, get, max_shard_size)
        if origin is not None:
            carry_files(origin.folder, fresh)
        if tokenizer is not None and not (fresh / "tokenizer.json").exists():
            tokenizer.save(fresh)
        _write_json(fresh / "config.json", config_json)
        if not (fresh / "generation_config.json").exists():
            special = {name: config_json[name] for name in SPECIAL if config_json.get(name) is not None}
            _write_json(fresh / "generation_config.json", {"_from_model_config": True, **special})
        if not (fresh / "README.md").exists():
            (fresh / "README.md").write_text(card(name, family.model_type, model.config), encoding="utf-8")

    return fill


def family_that_fits(config: ModelConfig) -> Family | None:
    """The first family that can say all of ``config``, so that its class in transformers computes the same; or none."""
    for family in (family for family in FAMILIES.values() if family.in_transformers):
        try:
            family.write(config)
        except UserError:
            continue
        return family
    return None


def _write_json(path: Path, tree: Tree) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carry_files(source: Path, fresh: Path) -> None:
    """Copies what lies beside the weights of a folder."""
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, fresh / path.name)


@dataclass(frozen=True)
class Outline:
    """A folder's model without its weights, and where these lie."""

    model: Decoder
    """On the meta device."""
    pieces: list[Piece]
    shards: Shards
    unused: set[str]
    """Tensors of ``shards`` that are no piece of the model."""

    def check(self) -> None:
        """Raises UserError with all names unless the files hold exactly the model's tensors, in name and shape."""
        _check_pieces(self.model.state_dict(), self.pieces, self.shards, self.unused)

    def sized(self) -> Decoder:
        """The model, still on the meta device, in the types that its weights have on disk. Raises as ``check`` does."""
        self.check()
        self.model.load_state_dict(_room(self.model.state_dict(), self.pieces, self.shards, {}, "meta"), assign=True)
        return self.model

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors, by our names, whose names start so; in the types that they have on disk."""
        own = [piece for piece in self.pieces if piece.parameter.startswith(prefix)]
        meta = self.model.state_dict()
        return _read({name: meta[name] for name in {piece.parameter: 0 for piece in own}}, own, self.shards, {}, "cpu")


def outline_of_family(folder: Path, config_json: Tree, pickle: bool = False) -> Outline:
    """Of a public family's folder. Raises UserError as ``load`` does."""
    family = family_of(config_json, folder)
    config = family.read(config_json, str(folder / "config.json"))
    shards = Shards(folder, pickle, config_json.get("quantization_config"))
    with without_memory():
        model = Pretrained(config, Origin(family, config_json, folder, shards))
    unused = family.unused_of(config, shards.shapes)
    model.origin = replace(model.origin, unused=tuple(sorted(unused)))
    pieces = plan(model, family.names, set(shards.shapes))
    return Outline(model, pieces, shards, unused | _repeated(model, family, shards))


def _repeated(model: Pretrained, family: Family, shards: Shards) -> set[str]:
    """The output matrix, where a folder has one although it is tied to the embedding. Raises UserError when they
    differ."""
    output, embedding = (family.names[name][0].parts[0] for name in ("output.weight", "embedding.weight"))
    if not model.config.tie_embeddings or not {output, embedding} <= shards.shapes.keys():
        return set()
    if not torch.equal(shards.get(output), shards.get(embedding)):
        raise UserError(f"{shards.folder}: tie_word_embeddings is true, but {output} differs from {embedding}")
    return {output}


def family_of(config_json: Tree, folder: Path) -> Family:
    """The family of a config.json. Raises UserError where there is no table for it, and offers the bridge, or says why
    that does not take it either."""
    kind = config_json.get("model_type")
    if kind not in FAMILIES:
        known = f"{folder}: model_type is {kind!r}; the decoder has a table for {', '.join(FAMILIES)}"
        if kind in REFUSED:
            raise UserError(f"{known}. Our engines cannot run it in transformers either: {REFUSED[kind]}")
        raise UserError(
            f"{known}. Other families run in transformers on our engines: import moeforge, then "
            f'AutoModelForCausalLM.from_pretrained("{folder}", experts_implementation="moeforge")'
        )
    return FAMILIES[kind]


def fill(
    model: Decoder,
    pieces: list[Piece],
    shards: Source,
    unused: set[str],
    dtype: torch.dtype | None,
    device: str,
    settle: Settle | None = None,
) -> None:
    """Gives a model on the meta device its weights, layer by layer. Raises UserError with all names unless the files
    hold exactly the model's tensors, in name and shape; then nothing has been read."""
    meta = model.state_dict()
    _check_pieces(meta, pieces, shards, unused)
    learnt = dict(model.named_parameters())  # what a controller moves keeps its type
    wanted = {name: dtype for name in meta if dtype is not None and name in learnt}
    parts: dict[str, list[Piece]] = {_layer_of(name): [] for name in meta}
    for piece in pieces:
        parts[_layer_of(piece.parameter)].append(piece)
    for name in sorted(parts, key=lambda name: name == ""):
        own = {key: tensor for key, tensor in meta.items() if _layer_of(key) == name}
        model.load_state_dict(_read(own, parts[name], shards, wanted, device), strict=False, assign=True)
        shards.close()  # mapped anew for each layer: pages that were read leave memory before others come
        if name and settle is not None:
            settle(model.get_submodule(name))


def _layer_of(name: str) -> str:
    """``blocks.3`` of a tensor's name; empty where it is in no layer."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""


def _check_pieces(meta: Mapping[str, Tensor], pieces: list[Piece], shards: Source, unused: set[str]) -> None:
    wanted = {piece.name: piece.as_theirs(meta[piece.parameter]).shape for piece in pieces}
    check(wanted, {name: shape for name, shape in shards.shapes.items() if name not in unused}, shards.folder)


def _read(
    meta: Mapping[str, Tensor], pieces: list[Piece], shards: Source, wanted: Mapping[str, torch.dtype], device: str
) -> dict[str, Tensor]:
    """The tensors of ``meta``, in the types ``wanted`` or else those of the files."""
    tensors = _room(meta, pieces, shards, wanted, device)

    def copy(piece: Piece, theirs: Tensor) -> None:
        piece.of_ours(tensors[piece.parameter]).copy_(piece.as_ours(theirs))

    with _one_thread(), ThreadPoolExecutor(READERS) as pool, torch.no_grad():
        waiting = deque[Future[None]]()
        for piece in sorted(pieces, key=lambda piece: shards.file_of[piece.name]):
            waiting.append(pool.submit(copy, piece, shards.get(piece.name)))
            if len(waiting) > 4 * READERS:
                waiting.popleft().result()
        for copied in waiting:
            copied.result()
    return tensors


def _room(
    meta: Mapping[str, Tensor], pieces: list[Piece], shards: Source, wanted: Mapping[str, torch.dtype], device: str
) -> dict[str, Tensor]:
    """What ``_read`` fills."""
    types: dict[str, torch.dtype] = {}
    for piece in pieces:  # parts of several types lie in the one that holds them all
        own = wanted.get(piece.parameter, shards.dtypes[piece.name])
        types[piece.parameter] = torch.promote_types(types.get(piece.parameter, own), own)
    return {
        name: ask_for_huge_pages(torch.empty(tensor.shape, dtype=types[name], device=device))
        for name, tensor in meta.items()
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of copies that each wait for a second thread take many times as long where another program holds its
    core: each is of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(wanted: Mapping[str, Any], found: Mapping[str, Any], source: Path) -> None:
    """Raises UserError that names every tensor which is missing, left over, or of another shape."""
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unknown {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(found[name])}, the config wants {list(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    if problems:
        raise UserError(f"{source}: {len(problems)} weights do not fit the config: {'; '.join(sorted(problems))}")
