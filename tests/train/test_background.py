"""Work beside the loop: it does not wait, one piece at a time, and no error is lost."""

import threading
import time

import pytest

from moeforge.train.background import Background


def test_it_does_not_wait_for_the_work_but_for_the_one_before():
    done, background, go = [], Background(), threading.Event()
    background.begin(lambda: (go.wait(5), done.append("first")))
    assert done == []
    threading.Timer(0.05, go.set).start()
    background.begin(lambda: done.append("second"))
    assert done[0] == "first"
    background.wait()
    assert done == ["first", "second"]


@pytest.mark.parametrize("then", ["wait", "begin", "leave"])
def test_an_error_comes_out_once(then):
    background = Background()

    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), background:
        background.begin(fail)
        if then != "leave":
            background.wait() if then == "wait" else background.begin(fail)
    background.thread, background.error = None, None
    background.wait()


def test_when_training_fails_its_own_error_stands_and_the_work_may_end():
    done = []
    with pytest.raises(ValueError, match="training"), Background() as background:
        background.begin(lambda: (time.sleep(0.05), done.append(True)))
        raise ValueError("training")
    assert done == [True]
