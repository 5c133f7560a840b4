"""Starting the processes of one machine, as torchrun does, and one clear word when one of them fails."""

import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moeforge.errors import UserError

GRACE = 2.0
"""Seconds in which a process that has failed may be stopped because another one failed before it."""
LATE = 10.0
"""The same, where on a busy machine that other one may be far behind: it starts, or ends, seconds apart."""
STOP_WITHIN = 20
"""Seconds that the others have to stop after one failed; then they are killed."""


def is_worker() -> bool:
    """Whether torchrun, or ``launch``, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(size: int, arguments: Sequence[str], resume: str, logs: Path) -> None:
    """Runs ``moeforge ARGUMENTS`` in ``size`` processes and waits for them; ``resume`` is what to type after a crash.

    The first one speaks to the terminal, the others to files of their own, which are kept in ``logs`` after a failure.
    Raises SystemExit with the exit code of the process that failed first, and shows what that one said; UserError when
    it was killed and could not; KeyboardInterrupt when this one was told to stop, after the others have.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would report what we do, at length
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            shutdown_timeout=STOP_WITHIN,
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, size), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "moeforge", *arguments)
        except SignalException as signal:
            raise KeyboardInterrupt from signal
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            said = _said(Path(folder))
            print(said.get(rank, ""), end="", file=sys.stderr)
            kept = f" What all but the first said is in {logs}." if _kept(said, logs) else ""
            if failure.exitcode > 0:
                print(kept.lstrip(), file=sys.stderr)
                raise SystemExit(failure.exitcode) from error
            raise UserError(
                f"process {rank} of {size} was killed by {failure.signal_name()}, and the others were stopped.{kept} "
                f"Go on from the last checkpoint with:\n  {resume}"
            ) from error


def _said(folder: Path) -> dict[int, str]:
    """By process, what it wrote."""
    said: dict[int, str] = {}
    for file in sorted(folder.glob("*/attempt_0/*/std*.log")):
        rank = int(file.parent.name)
        said[rank] = said.get(rank, "") + file.read_text(encoding="utf-8", errors="replace")
    return {rank: text for rank, text in said.items() if text}


def _kept(said: dict[int, str], logs: Path) -> bool:
    """Writes what there is, one file each; whether there is any."""
    for rank, text in said.items():
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"process-{rank}.log").write_text(text, encoding="utf-8")
    return bool(said)


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets the process speak whose error it is.

    An error that all have is the first one's to tell; a lost connection follows from another's end. So whoever may not
    be meant waits to be stopped.
    """
    rank = int(os.environ["RANK"])
    try:
        yield
    except UserError as error:
        if rank:
            time.sleep(LATE)
            raise UserError(f"process {rank}: {error}") from error
        raise
    except Exception as error:
        time.sleep(LATE if "onnection" in str(error) else GRACE)
        raise
