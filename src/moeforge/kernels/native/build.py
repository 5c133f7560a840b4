"""Builds the C++ once per machine, keeps it in the user's cache, and says why where it cannot.

Lies in ``$MOEFORGE_CACHE/native``, by default ``~/.cache/moeforge/native``; the folder can be deleted at any time. A
file's name is a digest of sources, compiler and processor, its last bytes are a digest of the file: what is stale is
not found, what is damaged or does not load is made again. Processes that come at once wait for one build under a lock.
A library is code: a file or folder is trusted only where it is the user's or root's, and nobody else may write to it.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
"""Products and sums are fused only where the source says so: what must agree bit for bit hangs on no compiler."""
NEEDED = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
USED = {"avx512_bf16": ("-mavx512bf16",), "avx512_vnni": ("-mavx512vnni",), "amx_bf16": ("-mamx-tile", "-mamx-bf16")}
"""Flags of the processor, as Linux names them, to what tells the compiler to use them."""
DIGEST = hashlib.sha256().digest_size
PATIENCE = 300
"""Seconds until a compiler is given up."""
KEPT = 8
"""Libraries in the cache: of other sources, compilers and processors, the newest."""
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
        level = logging.WARNING if SOURCES else logging.DEBUG  # a model's code carries none: not for its user to mend
        logging.getLogger("moeforge").log(level, "the native engine is off, torch computes instead: %s", error)
        return str(error)


def cache_folder() -> Path:
    """Where libraries are kept. Raises CannotBuildError where there is no home."""
    try:
        root = os.environ.get("MOEFORGE_CACHE") or Path.home() / ".cache" / "moeforge"
        return Path(root).expanduser() / "native"
    except RuntimeError as error:
        raise CannotBuildError(f"there is no folder for it: {error}; MOEFORGE_CACHE can name one") from error


def open_or_build(check: Check) -> ctypes.CDLL:
    """The library from the cache, or built into it. Raises CannotBuildError."""
    if not SOURCES:
        raise CannotBuildError("its C++ files are not beside it")
    command = [*_compiler(), *FLAGS, *_processor_flags()]
    path = cache_folder() / f"{_key(command)}.so"
    import fcntl  # not on Windows, which has no processor flags to read either

    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not _own(path.parent):
            raise CannotBuildError(f"{path.parent} is not the user's own; MOEFORGE_CACHE can name another folder")
        if opened := _open(path):
            return opened
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if opened := _open(path):  # another process has built it meanwhile
                return opened
            _build(command, path, check)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotBuildError(f"{path.parent} cannot be written or loaded from: {error}") from error


def _open(path: Path) -> ctypes.CDLL | None:
    """The library, or None where the file is not there, not whole, not to be trusted, or not for this system."""
    try:
        return ctypes.CDLL(str(path)) if _own(path) and whole(path) else None
    except OSError:
        return None


def _own(path: Path) -> bool:
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def whole(path: Path) -> bool:
    """Whether the file is there and ends with its own digest."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _build(command: list[str], path: Path, check: Check) -> None:
    """Compiles, compares with the reference, and only then puts the file in place. Under the lock."""
    _clear(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        done = _run([*command, *sources, "-o", str(made)])
        if done.returncode:
            line = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise CannotBuildError(f"{command[0]} failed: {line.strip()}")
        wrong = check(ctypes.CDLL(str(made)))
        if wrong:
            raise CannotBuildError(f"what {command[0]} built is wrong: {wrong}")
        content = made.read_bytes()
        signed = Path(folder) / "signed"  # another file: this process has mapped the first one
        signed.write_bytes(content + hashlib.sha256(content).digest())
        signed.chmod(0o644)
        signed.replace(path)


def _clear(folder: Path) -> None:
    """Removes what killed builds left, and the oldest libraries."""
    for left in folder.glob("tmp*/"):
        shutil.rmtree(left, ignore_errors=True)
    for old in sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)[: 1 - KEPT]:
        old.unlink()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise CannotBuildError(f"{command[0]} did not end in {PATIENCE} seconds") from error
    except OSError as error:
        raise CannotBuildError(f"{command[0]} does not run: {error}") from error


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
    """What Linux says that the processor can do; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _key(command: list[str]) -> str:
    done = _run([command[0], "--version"])
    if done.returncode:
        raise CannotBuildError(f"{command[0]} does not run: --version ended with {done.returncode}")
    texts = [*command, done.stdout, *(source.read_text(encoding="utf-8") for source in SOURCES)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
