"""Starting the processes of one machine, as torchrun does, and one clear word when one of them fails."""

import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moeforge.errors import UserError

GRACE = 2.0
"""Seconds in which a process that has failed may be stopped because another one failed before it."""
STOP_WITHIN = 20
"""Seconds that the others have to stop after one failed; then they are killed."""


def is_worker() -> bool:
    """Whether torchrun, or ``launch``, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(size: int, arguments: Sequence[str], resume: str) -> None:
    """Runs ``moeforge ARGUMENTS`` in ``size`` processes and waits for them; ``resume`` is what to type after a crash.

    Raises SystemExit with the exit code of the process that failed first, which has said why; UserError when it was
    killed and could not; KeyboardInterrupt when this one was told to stop, after the others have.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would report what we do, at length
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        shutdown_timeout=STOP_WITHIN,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "moeforge", *arguments)
    except SignalException as signal:
        raise KeyboardInterrupt from signal
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            raise SystemExit(failure.exitcode) from error
        raise UserError(
            f"process {rank} of {size} was killed by {failure.signal_name()}, and the others were stopped. "
            f"Go on from the last checkpoint with:\n  {resume}"
        ) from error


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
            time.sleep(GRACE)
            raise UserError(f"process {rank}: {error}") from error
        raise
    except Exception:
        time.sleep(GRACE)
        raise
