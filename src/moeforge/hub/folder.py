"""A model folder: ``config.json``, ``model.safetensors``, ``tokenizer.json``. Written whole or not at all.

Opening one leaves no weight at its random start and drops none from the file: both fail with the names.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeforge import __version__
from moeforge.config import Tree
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.remote import carry
from moeforge.hub.versions import model_config
from moeforge.models import Decoder, ModelConfig

MODEL_TYPE = "moeforge"


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes ``folder`` from what ``fill`` writes into a fresh one beside it; on any failure the old one is untouched.

    Raises UserError when the disk is full or not writable.
    """
    fresh = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        fill(fresh)
        for path in [*fresh.iterdir(), fresh]:
            _flush(path)
        _replace(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}. What was there before is untouched") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes one text file whole, or leaves the old one. Raises UserError when it cannot."""
    fresh = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk itself: a rename that survives a power cut must not point at data that did not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old)


def save(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model folder; weights in the type they have."""

    def fill(fresh: Path) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, fresh / "model.safetensors"
        )
        config = {
            "model_type": MODEL_TYPE,
            "moeforge_version": __version__,
            "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
            "eos_token_id": tokenizer.eos_id,
            "model": json.loads(model.config.model_dump_json()),
            **carry(model.config, fresh),
        }
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(fresh)

    write_whole(folder, fill)


def load(folder: str | Path, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer. A run folder stands for the ``model`` inside it.

    Raises UserError when something is missing, cut short, or does not fit together.
    """
    folder = _inner(Path(folder))
    config, _ = read_config(folder)
    tokenizer = Tokenizer.open(folder)
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(f"{folder}: the model has vocab_size {config.vocab_size}, its tokenizer {tokenizer.vocab_size}")
    with torch.device("meta"):
        model = Decoder(config)
    tensors = read_tensors(folder / "model.safetensors")
    fit(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval(), tokenizer


def _inner(folder: Path) -> Path:
    """The model folder inside a run folder, or the folder itself."""
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """The model's config and the bytes of one weight, without its weights. Raises UserError as ``load`` does."""
    folder = _inner(folder)
    path = folder / "config.json"
    try:
        tree: Tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no model folder: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if tree.get("model_type") != MODEL_TYPE:
        raise UserError(f"{path}: model_type is {tree.get('model_type')!r}; this version opens '{MODEL_TYPE}' folders")
    dtype = getattr(torch, str(tree.get("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{path}: dtype {tree['dtype']!r} is none that torch knows")
    return model_config(tree, source=str(path)), dtype.itemsize


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is missing or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error})") from error


def fit(model: Decoder, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Raises UserError with the names unless ``tensors`` are exactly the model's, in name and shape."""
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    problems += [f"unknown {name}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the config wants {list(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise UserError(f"{source}: {len(problems)} weights do not fit the config: {shown}")
