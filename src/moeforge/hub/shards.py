"""The weight files of a folder: one, or several with an index; safetensors, or pickles where asked for."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeforge.errors import UserError
from moeforge.hub.packed import Packed, find_packed

SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
MAX_SHARD_SIZE = "5GB"


class Source(Protocol):
    """Files of weights: what they hold by name, and each tensor when it is asked for."""

    folder: Path
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    file_of: dict[str, Path]

    def get(self, name: str) -> Tensor:
        """One tensor, backed by its file."""
        ...

    def close(self) -> None:
        """Lets go of the files."""


class Shards:
    """What a folder's weight files hold. One file is open at a time, mapped into memory; nothing is read ahead.

    Raises UserError for files that are missing, cut short, or pickles that nobody asked for.
    """

    def __init__(self, folder: Path, pickle: bool = False, quantization: Any = None) -> None:
        self.folder = folder
        files, index = _files(folder, pickle)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.file_of: dict[str, Path] = {}
        self._folded: dict[str, int] = {}
        self._open: tuple[Path | None, Any] = (None, None)
        for file in files:
            for name, (shape, dtype) in _header(file).items():
                if name in self.file_of:
                    raise UserError(f"{name} is in {self.file_of[name].name} and in {file.name}")
                self.shapes[name], self.dtypes[name], self.file_of[name] = shape, dtype, file
        held = {*self.file_of}
        self._packed = self._fold_packed(quantization)
        lost = sorted(f"{name} in {file}" for name, file in index.items() if name not in held)
        if lost:
            raise UserError(f"{folder}: the index names tensors that their files lack: {', '.join(lost)}")

    def _fold_packed(self, settings: Any) -> dict[str, Packed]:
        """Shows a weight that lies packed in two tensors as the one that it is."""
        try:
            found = find_packed(self.shapes, self.dtypes, settings)
        except ValueError as error:
            raise UserError(f"{self.folder}: {error}") from error
        for name, packed in found.items():
            parts = (packed.values, packed.scales, *packed.beside)
            self._folded[name] = sum(map(self.nbytes, parts))
            for part in parts:
                del self.shapes[part], self.dtypes[part]
            self.shapes[name], self.dtypes[name] = packed.shape, torch.bfloat16
            self.file_of[name] = self.file_of[packed.values]
        return found

    def get(self, name: str) -> Tensor:
        """One tensor, backed by the mapped file: copy what is to stay."""
        if name in self._packed:
            packed = self._packed[name]
            return packed.unpack(self._get(packed.values), self._get(packed.scales))
        return self._get(name)

    def _get(self, name: str) -> Tensor:
        file = self.file_of[name]
        if self._open[0] != file:
            self._open = (None, None)  # unmap the last file before the next one is mapped
            self._open = (file, _reader(file))
        return self._open[1](name)

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return self.shapes[name].numel() * self.dtypes[name].itemsize

    def bytes_on_disk(self, name: str) -> int:
        """Bytes that it takes in its file: fewer than ``nbytes`` where it lies packed."""
        return self._folded.get(name, self.nbytes(name))

    def close(self) -> None:
        """Lets go of the mapped file; ``get`` maps it anew."""
        self._open = (None, None)


def _files(folder: Path, pickle: bool) -> tuple[list[Path], dict[str, str]]:
    """The weight files in order, and the index (tensor -> file name) where there is one."""
    for single in (SAFE, PICKLE) if pickle else (SAFE,):
        path = folder / f"{single}.index.json"
        if path.exists():
            index = _index(path)
            files = [folder / name for name in sorted(set(index.values()))]
            gone = [file.name for file in files if not file.exists()]
            if gone:
                raise UserError(f"{path} names files that are missing: {', '.join(gone)}")
            return files, index
        if (folder / single).exists():
            return [folder / single], {}
    if not pickle and any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds pickles (pytorch_model*.bin), and a pickle can run code while it is opened; "
            "moeforge.load(path, pickle=True) and moeforge convert --pickle open them for tensors only"
        )
    raise UserError(f"{folder / SAFE} is missing")


def _index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no index of weight files: {error!r}") from error
    if not isinstance(index, dict) or not all(isinstance(name, str) and "/" not in name for name in index.values()):
        raise UserError(f"{path} is no index of weight files: weight_map does not give file names of this folder")
    return index


def _header(file: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    if file.suffix == ".bin":
        return {name: (tensor.shape, tensor.dtype) for name, tensor in _unpickled(file).items()}
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
            return {name: (torch.Size(part.get_shape()), DTYPES[part.get_dtype()]) for name, part in slices.items()}
    except KeyError as error:
        raise UserError(f"{file} holds numbers of type {error}, which torch does not compute with") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error})") from error


DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Names in a safetensors header -> types of torch."""


def _reader(file: Path) -> Callable[[str], Tensor]:
    if file.suffix == ".bin":
        return _unpickled(file).__getitem__
    return safe_open(file, framework="pt").get_tensor


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    """A pickle that may build tensors and nothing else."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises its own, zip's and pickle's
        raise UserError(f"{file} is no file of weights, or is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} holds something else than tensors by name")
    return tensors


def write(folder: Path, sizes: Mapping[str, int], get: Callable[[str], Tensor], max_shard_size: int | str) -> None:
    """Safetensors of at most so many bytes each (``"5GB"`` is understood), with an index where there are several, as
    transformers writes them.

    ``sizes`` are the bytes of each tensor, in order. One shard's tensors are asked for at a time. Raises UserError.
    """
    limit = _bytes(max_shard_size)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [SAFE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: get(name).contiguous() for name in shard}, folder / file, {"format": "pt"})
    if count > 1:
        index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        tree = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(index.items()))}
        (folder / f"{SAFE}.index.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _bytes(size: int | str) -> int:
    """``5GB``, ``200MB`` or a number. Raises UserError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?)B?\s*", str(size), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"max_shard_size = {size!r} is no number of bytes; 5GB and 200MB are understood")
    return round(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])
