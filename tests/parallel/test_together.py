"""Processes that cannot be one run say so: of different software, of different minds, or not there."""

import socket

import pytest
import torch.distributed as dist

from moeforge.errors import UserError
from moeforge.parallel import together
from moeforge.parallel.layout import Layout

pytestmark = pytest.mark.dist


def of_two_minds() -> str:
    with pytest.raises(UserError) as raised:
        together.check_alike(Layout(ep=1 + dist.get_rank()), None)
    return str(raised.value)


def of_two_versions() -> str:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            patch.setattr(together, "version", lambda package: "0.0.1")
        with pytest.raises(UserError) as raised:
            together.check_alike(Layout(), None)
    return str(raised.value)


@pytest.mark.parametrize(
    "differ, words", [(of_two_minds, "with --ep=2"), (of_two_versions, "is moeforge 0.0.1 on torch")]
)
def test_processes_that_differ_are_told_apart_on_all(processes, differ, words):
    for told in processes(2).run(differ):
        assert told.startswith("processes must be alike: the first is moeforge ") and "; process 1 is" in told
        assert words in told.partition("; process 1")[2]


def test_a_first_process_that_is_not_there(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(together, "JOIN_WITHIN", together.JOIN_WITHIN / 120)
    with (
        pytest.raises(UserError, match=f"the first process is not to be found at 127.0.0.1:{port}: "),
        together.join(Layout()),
    ):
        pass
