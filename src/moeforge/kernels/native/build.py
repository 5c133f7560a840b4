"""Builds the C++ once per machine, keeps it in the user's cache, and says why where it cannot.

Lies in ``$MOEFORGE_CACHE/native``, by default ``~/.cache/moeforge/native``; the folder can be deleted at any time. A
file's name is a digest of sources, compiler and processor, its last bytes are a digest of the file: what is stale is
not found, what is damaged is made again. Processes that come at once wait for one build under a lock.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
NEEDED = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
USED = {"avx512_bf16": ("-mavx512bf16",), "amx_bf16": ("-mamx-tile", "-mamx-bf16")}
"""Flags of the processor, as Linux names them, to what tells the compiler to use them."""
DIGEST = hashlib.sha256().digest_size
SOURCES = sorted(Path(__file__).parent.glob("*.[ch]*"))

Check = Callable[[ctypes.CDLL], str | None]


class CannotBuildError(Exception):
    """Why there is no library here, in words that complete "native cannot run: "."""


@cache
def library(check: Check) -> ctypes.CDLL | str:
    """The loaded library, or why there is none; that is also logged, once. A new build has passed ``check``."""
    try:
        return open_or_build(check)
    except CannotBuildError as error:
        logging.getLogger("moeforge").warning("the native engine is off, torch computes instead: %s", error)
        return str(error)


def cache_folder() -> Path:
    """Where libraries are kept."""
    root = os.environ.get("MOEFORGE_CACHE") or Path.home() / ".cache" / "moeforge"
    return Path(root).expanduser() / "native"


def open_or_build(check: Check) -> ctypes.CDLL:
    """The library from the cache, or built into it. Raises CannotBuildError."""
    if not SOURCES:  # the copy of this package that a model folder carries is Python alone
        raise CannotBuildError("its C++ does not travel with a model; pip install moeforge has it")
    command = [*_compiler(), *FLAGS, *_processor_flags()]
    path = cache_folder() / f"{_key(command)}.so"
    if whole(path):
        return ctypes.CDLL(str(path))
    import fcntl  # not on Windows, which has no processor flags to read either

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole(path):  # or another process has built it meanwhile
                _build(command, path, check)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotBuildError(f"{path.parent} cannot be written or loaded from: {error}") from error


def whole(path: Path) -> bool:
    """Whether the file is there and ends with its own digest."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _build(command: list[str], path: Path, check: Check) -> None:
    """Compiles, compares with the reference, and only then puts the file in place."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        done = subprocess.run([*command, *sources, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            line = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise CannotBuildError(f"{command[0]} failed: {line.strip()}")
        wrong = check(ctypes.CDLL(str(made)))
        if wrong:
            raise CannotBuildError(f"what {command[0]} built is wrong: {wrong}")
        content = made.read_bytes()
        signed = Path(folder) / "signed"  # another file: this process has mapped the first one
        signed.write_bytes(content + hashlib.sha256(content).digest())
        signed.replace(path)


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else ["g++" if shutil.which("g++") else "c++"]
    if not command or shutil.which(command[0]) is None:
        missing = f"the compiler in CXX, {named}, is not there" if named else "there is no C++ compiler (g++ or c++)"
        raise CannotBuildError(missing)
    return command


def _processor_flags() -> list[str]:
    if not sys.platform.startswith("linux"):
        raise CannotBuildError(f"it is made for Linux on x86, not {sys.platform}")
    has = processor()
    missing = [flag for flag in NEEDED if flag not in has]
    if missing:
        raise CannotBuildError(f"the processor lacks {missing[0]}")
    return [f"-m{flag}" for flag in NEEDED] + [flag for name, flags in USED.items() if name in has for flag in flags]


@cache
def processor() -> set[str]:
    """What Linux says that the processor can do."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _key(command: list[str]) -> str:
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuildError(f"{command[0]} does not run: {error}") from error
    texts = [*command, version, *(source.read_text(encoding="utf-8") for source in SOURCES)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
