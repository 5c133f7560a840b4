"""A server's life: a port, a model, requests, and an end on which nobody is cut off without a word."""

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from moeforge.errors import UserError
from moeforge.generate import Engine
from moeforge.serve.app import build
from moeforge.serve.limits import Keys
from moeforge.serve.limits import Limits as Limits
from moeforge.serve.metrics import Metrics
from moeforge.serve.state import State
from moeforge.serve.template import ChatTemplate

LOCAL = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int, keys: Keys) -> socket.socket:
    """A socket at the address, before any model is loaded.

    Raises UserError where the port is taken, and for other addresses than this machine's own without keys.
    """
    if host not in LOCAL and not keys:
        raise UserError(
            f"--host {host} lets other machines in, and there are no API keys: name a file of keys with "
            "--api-key-file, or set MOEFORGE_API_KEYS; without keys the server is only for this machine, 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise UserError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; name another with --port"
        ) from error
    return bound


def serve(
    engine: Engine,
    bound: socket.socket,
    keys: Keys,
    limits: Limits,
    folder: Path,
    *,
    grace_s: float,
    show_routing: bool = False,
    greeting: str = "",
    machine_gb_s: float | None = None,
) -> None:
    """Says ``greeting`` and runs until SIGTERM or SIGINT: then takes nothing new, and ends what still runs after
    ``grace_s`` seconds."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "level": "%(levelname)s", "event": %(message)s}'))
    logging.getLogger("moeforge.serve").handlers[:] = [handler]
    logging.getLogger("moeforge.serve").setLevel(logging.INFO)
    template = ChatTemplate.open(folder, engine.tokenizer)
    state = State(engine, limits, keys, template, Metrics(engine, machine_gb_s), show_routing, {"about": engine.about})
    config = uvicorn.Config(build(state), log_level="error", access_log=False, lifespan="off", timeout_keep_alive=30)
    asyncio.run(_until_told(uvicorn.Server(config), state, bound, grace_s, greeting))


async def _until_told(
    server: uvicorn.Server, state: State, bound: socket.socket, grace_s: float, greeting: str
) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    print(greeting, file=sys.stderr, flush=True)  # only now: who reads it may already want it to end
    running = asyncio.create_task(server._serve([bound]))  # uvicorn's serve() would take the signals for itself
    stop = asyncio.create_task(told.wait())
    await asyncio.wait((running, stop), return_when=asyncio.FIRST_COMPLETED)
    state.draining = True
    await asyncio.to_thread(state.engine.close, grace_s)
    server.should_exit = True
    server.config.timeout_graceful_shutdown = 5
    await running
