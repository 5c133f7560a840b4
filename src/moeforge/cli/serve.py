"""``moeforge serve``: a model behind the OpenAI API."""

import os
from pathlib import Path
from typing import Annotated

import typer

KEYS = "A file with one API key per line; else MOEFORGE_API_KEYS, between commas. None: only this machine may ask."
UNSAFE = "Serve although this model's routers compare tokens: then one request can change, and read, another's text."
ROUTING = "Show every token's experts to who asks: they say what a text is about."


def serve(
    model: Annotated[Path, typer.Argument(help="A model folder or a run folder.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model.", show_default="the folder's")] = None,
    weights: Annotated[str, typer.Option(help="as stored, float32, bf16, int8 or int4.")] = "as stored",
    api_key_file: Annotated[Path | None, typer.Option(help=KEYS)] = None,
    max_running: Annotated[int, typer.Option(help="Texts written at the same time.", min=1)] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=0)] = 256,
    token_budget: Annotated[int, typer.Option(help="Tokens of one pass.", min=1)] = 512,
    kv_memory: Annotated[float, typer.Option(help="GiB for keys and values.")] = 1.0,
    max_seconds: Annotated[float, typer.Option(help="For one request.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds to finish after SIGTERM.", min=0)] = 30.0,
    domain: Annotated[str | None, typer.Option(help="Of all texts, for a model that routes by it.")] = None,
    show_routing: Annotated[bool, typer.Option("--show-routing", help=ROUTING)] = False,
    unsafe_batch_dependent: Annotated[bool, typer.Option("--unsafe-batch-dependent", help=UNSAFE)] = False,
) -> None:
    """Serve a model: the OpenAI API, a page to try it at /, metrics at /metrics."""
    from moeforge.cli.speed import read_bandwidth
    from moeforge.config import build
    from moeforge.generate import Settings, open_engine
    from moeforge.hub.folder import model_folder
    from moeforge.kernels.allocator import keep_freed_memory
    from moeforge.serve import Limits
    from moeforge.serve import serve as run
    from moeforge.serve.limits import Keys
    from moeforge.serve.run import listen

    asked = {"weights": weights, "max_running": max_running, "max_waiting": max_waiting, "token_budget": token_budget}
    asked |= {"kv_memory": kv_memory, "unsafe_batch_dependent": unsafe_batch_dependent}
    settings = build(Settings, asked, source="serve")
    limits = build(Limits, {"max_seconds": max_seconds}, source="serve")
    keys = Keys.read(api_key_file, os.environ.get("MOEFORGE_API_KEYS"))
    bound = listen(host, port, keys)
    machine = read_bandwidth() / 1e9
    with bound, open_engine(model, settings, domain=domain) as engine:
        keep_freed_memory()  # not before: layers that are rounded while they are read leave memory
        engine.name = name or engine.name
        where = bound.getsockname()
        shown = f"[{where[0]}]" if ":" in where[0] else where[0]
        who = "with an API key" if keys else "without a key, from this machine"
        greeting = (
            f"{engine.name}: {engine.about}\n"
            f"listening at http://{shown}:{where[1]} ({who}); OpenAI API under /v1, a page at /"
        )
        asked_by = engine, bound, keys, limits, model_folder(model)
        run(*asked_by, grace_s=grace, show_routing=show_routing, greeting=greeting, machine_gb_s=machine)
