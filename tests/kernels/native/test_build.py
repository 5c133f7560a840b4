"""Building the native engine: once, whole, under a lock, checked; and every way in which it cannot be had."""

import ctypes
import hashlib
import logging
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from moeforge.kernels.native import build, engine
from moeforge.kernels.native.build import CannotBuildError, open_or_build, whole

TINY = 'extern "C" int answer() { return 42; }\n'

needs_compiler = pytest.mark.skipif(bool(set(build.NEEDED) - build.processor()), reason="this processor lacks AVX-512")


def right(lib: ctypes.CDLL) -> str | None:
    """The check that a good library passes."""
    return None if lib.answer() == 42 else "the answer"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a source that compiles in no time."""
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY)
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def only_library(cache: Path) -> Path:
    """The one file there; nothing half-written lies beside it."""
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".so"]
    return next(cache.glob("*.so"))


@needs_compiler
def test_a_library_is_built_once_and_then_opened(cache: Path) -> None:
    assert open_or_build(right).answer() == 42
    path = only_library(cache)
    before = path.stat().st_mtime_ns

    def fails(lib: ctypes.CDLL) -> str | None:
        raise AssertionError("what lies in the cache has been checked")

    assert open_or_build(fails).answer() == 42 and path.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:999] + b"x" + b[1000:]])
def test_a_damaged_file_is_made_again(cache: Path, damage) -> None:
    open_or_build(right)
    path = only_library(cache)
    broken = path.with_name("broken")
    broken.write_bytes(damage(path.read_bytes()))  # a new file: this process has mapped the old one
    broken.replace(path)
    assert not whole(path)
    assert open_or_build(right).answer() == 42 and whole(path)


@needs_compiler
def test_a_whole_file_that_does_not_load_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another system's, over a home that both share."""
    open_or_build(right)
    other, foreign = cache.parent / "other", b"another system's library"
    path = other / "native" / only_library(cache).name
    path.parent.mkdir(parents=True)
    path.write_bytes(foreign + hashlib.sha256(foreign).digest())
    path.chmod(0o644)
    assert whole(path)
    monkeypatch.setenv("MOEFORGE_CACHE", str(other))
    assert open_or_build(right).answer() == 42
    assert only_library(path.parent) == path and foreign not in path.read_bytes()


@needs_compiler
@pytest.mark.parametrize("distrusted", [lambda path: path.chmod(0o666), lambda path: os.chown(path, 12345, -1)])
def test_only_a_file_and_a_folder_of_ones_own_are_loaded(cache: Path, distrusted: Callable[[Path], None]) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    umask = os.umask(0o002)
    open_or_build(right)
    os.umask(umask)
    path = only_library(cache)
    before = path.stat()
    assert not stat.S_IMODE(before.st_mode | cache.stat().st_mode) & 0o022
    distrusted(path)
    assert open_or_build(right).answer() == 42
    after = path.stat()
    assert after.st_ino != before.st_ino and (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
    distrusted(cache)
    with pytest.raises(CannotBuildError, match=r"native is not the user's own; MOEFORGE_CACHE can name another"):
        open_or_build(right)


@needs_compiler
def test_what_killed_builds_left_and_old_libraries_are_removed(cache: Path) -> None:
    open_or_build(right)
    first = only_library(cache)
    os.utime(first, (0, 0))
    (cache / "tmp_killed").mkdir()
    (cache / "tmp_killed" / "half.so").write_bytes(b"half")
    for i in range(build.KEPT - 1):
        (cache / f"{i}.so").write_bytes(b"")
    build.SOURCES[0].write_text(TINY + "// another\n")
    open_or_build(right)
    assert not first.exists() and len(list(cache.glob("*.so"))) == build.KEPT
    assert not (cache / "tmp_killed").exists()


def fake_compiler(folder: Path, compiles: str) -> str:
    """Says its version; asked to compile, runs a line of shell in which $out is the library to write."""
    path = folder / "fake"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo 1\nfor out; do :; done\n{compiles}\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
@pytest.mark.parametrize(
    ("compiles", "message"),
    [("exec sleep 60", "fake did not end in 0.2 seconds"), ("echo text >$out", "native cannot be written or loaded")],
)
def test_a_compiler_that_hangs_or_writes_no_library_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: str, message: str
) -> None:
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, compiles))
    with pytest.raises(CannotBuildError, match=message):
        open_or_build(right)
    assert os.listdir(cache) == ["lock"]


@needs_compiler
def test_without_a_home_it_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEFORGE_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # as containers are run: nobody that /etc/passwd names
    with pytest.raises(CannotBuildError, match=r"no folder for it: .*home directory.*; MOEFORGE_CACHE can name one"):
        open_or_build(right)


@needs_compiler
def test_another_source_is_another_library(cache: Path) -> None:
    open_or_build(right)
    build.SOURCES[0].write_text(TINY.replace("42", "43"))
    with pytest.raises(CannotBuildError, match=r"what g\+\+ built is wrong: the answer"):
        open_or_build(right)
    only_library(cache)
    assert open_or_build(lambda lib: None).answer() == 43


def _in_child(source: str, queue) -> None:
    build.SOURCES = [Path(source)]
    queue.put(open_or_build(right).answer())


@needs_compiler
def test_processes_that_come_at_once_build_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_in_child, args=(str(build.SOURCES[0]), queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [42] * 3
    for child in children:
        child.join()
    only_library(cache)


@needs_compiler
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CXX", "no-such-compiler", "the compiler in CXX, no-such-compiler, is not there"),
        ("CXX", "false", "false does not run"),
        ("PATH", "", r"there is no C\+\+ compiler"),
        ("MOEFORGE_CACHE", "/proc/no-place", "/proc/no-place/native cannot be written"),
        ("MOEFORGE_CACHE", "~no-such-user/x", r"there is no folder for it: .*; MOEFORGE_CACHE can name one"),
    ],
)
def test_what_cannot_be_had_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(CannotBuildError, match=message):
        open_or_build(right)


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing(cache: Path) -> None:
    build.SOURCES[0].write_text("int answer( {")
    with pytest.raises(CannotBuildError, match=r"g\+\+ failed: .*tiny\.cpp:1:.*error"):
        open_or_build(right)
    assert os.listdir(cache) == ["lock"]


@needs_compiler
def test_the_engine_itself_builds_and_passes_its_check() -> None:
    """Where it could run, other tests must not be skipped because it is broken."""
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")):
        pytest.skip("there is no compiler")
    assert engine.missing() is None


def test_another_processor_is_named_and_said_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "processor", lambda: {"avx2", "fma", "f16c"})
    with caplog.at_level(logging.WARNING, "moeforge"):
        answers = {build.library(right) for _ in range(3)}
    build.library.cache_clear()
    assert answers == {"the processor lacks avx512f"}
    said = "the native engine is off, torch computes instead: the processor lacks avx512f"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_code_without_its_sources_says_so_to_whom_listens_closely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "SOURCES", [])
    with caplog.at_level(logging.DEBUG, "moeforge"):
        assert build.library(right) == "its C++ files are not beside it"
    build.library.cache_clear()
    assert [(record.levelno, "not beside it" in record.getMessage()) for record in caplog.records] == [(10, True)]
