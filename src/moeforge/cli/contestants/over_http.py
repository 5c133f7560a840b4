"""Our server in a process of its own, and clients that stream from it: plain sockets, to weigh as little as can be."""

import asyncio
import atexit
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from moeforge.cli.contestants import Job, Texts, Write, take_turns

HOST = "127.0.0.1"
PATIENCE_S = 120


def opened(job: Job) -> tuple[Write, float]:
    """A server that ends with this process."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moeforge", "serve", job.path, "--port", str(port)]
    command += ["--weights", job.weights, "--max-running", str(job.clients)]
    server = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    atexit.register(server.terminate)
    asyncio.run(_ready(port, server))
    return lambda prompts, new: asyncio.run(_write(port, prompts, new)), 0


async def _ready(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and server.poll() is None:
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.write(b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        if b" 200 " in status:
            return
        await asyncio.sleep(0.05)
    raise RuntimeError("the server did not become ready")


async def _write(port: int, prompts: Sequence[Sequence[int]], new: int) -> Texts:
    started = time.perf_counter()
    times = await asyncio.gather(*(_client(port, prompt, new, started) for prompt in prompts))
    return {"tokens": [], "times": [*times]}


async def _client(port: int, prompt: Sequence[int], new: int, started: float) -> list[float]:
    """The moments at which the tokens of one streamed answer came."""
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True}
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    head = ("POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json", "Connection: close")
    writer.write("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()}")
    moments = []
    async for line in reader:
        if b'"finish_reason": null' in line:  # one for each token, also where its text is yet to come
            moments.append(time.perf_counter() - started)
    writer.close()
    return moments


if __name__ == "__main__":
    take_turns(opened)
