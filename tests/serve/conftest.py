"""A real server process over a small model with random weights, and its clients."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.hub import save
from moeforge.models import Decoder, ModelConfig

pytest.importorskip("fastapi", reason="the server: pip install 'moeforge[serve]'")
httpx = pytest.importorskip("httpx", reason="needs a client")

SHAPE = {
    **{"vocab_size": 257, "d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 256},
    "init": {"type": "normal", "std": 0.2},
    "moe": {"experts": {"num_experts": 4, "d_expert": 16}, "router": {"select": {"k": 2}}},
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def model_folder(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """A model folder, with a chat template."""
    torch.manual_seed(2)
    save(Decoder(ModelConfig.model_validate(SHAPE | changes)), train_or_open(Bytes(), ()), folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's."""
    return model_folder(tmp_path_factory.mktemp("served") / "tiny")


class Served:
    """A server process."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process, self.url = process, url
        self.log: list[str] = []
        self.reading = threading.Thread(target=self._read, daemon=True)  # or the pipe would fill
        self.reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def metric(self, name: str) -> float:
        """One number of /metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        (found,) = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return float(found)

    def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Waits for it."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)


@contextmanager
def serving(folder: Path, *options: object, **environment: str) -> Iterator[Served]:
    """A server on a free port; it has to end by itself after SIGTERM."""
    command = [sys.executable, "-m", "moeforge", "serve", str(folder), "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "listening at" in line:
            break
    else:
        raise AssertionError("".join(lines))
    served = Served(process, re.findall(r"http://\S+", lines[-1])[0])
    try:
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
        served.reading.join()
        process.stderr.close()
        assert code == 0, "".join(served.log)


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Served]:
    """One for all tests that leave it as it was."""
    with serving(folder, "--show-routing", "--max-running", 8, "--grace", 2) as served:
        yield served


@pytest.fixture
def post(server: Served) -> Callable[..., Any]:
    """``post("/v1/completions", prompt="a")``."""

    def send(path: str, **fields: Any) -> Any:
        return httpx.post(f"{server.url}{path}", json=fields, timeout=60)

    return send


def events(response: Any) -> list[Any]:
    """The JSON of each server-sent event."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
