"""From a folder to a running engine."""

from functools import partial
from pathlib import Path

from torch import nn

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate.bridged import open_bridged_engine
from moeforge.generate.engine import Engine
from moeforge.generate.runner import BlockRunner, blocks_wanted, bytes_per_block
from moeforge.generate.settings import Settings
from moeforge.hub import load
from moeforge.hub.folder import model_folder, outline, read_config
from moeforge.hub.theirs import is_theirs
from moeforge.models import Decoder
from moeforge.models.memory import pass_bytes
from moeforge.models.weights import bytes_by_class, hold, turn

GIB = 2**30


def open_engine(
    folder: str | Path, settings: Settings | None = None, device: str = "cpu", domain: str | None = None
) -> Engine:
    """An engine over the model in ``folder``.

    Raises UserError as ``hub.load`` and ``BlockRunner`` do, and, before anything is loaded, when memory will not do.
    """
    settings, name = settings or Settings(), Path(folder).resolve().name
    folder = model_folder(Path(folder))
    if is_theirs(folder):
        return open_bridged_engine(folder, settings, domain)
    config, itemsize = read_config(folder)
    held = int({"float32": 4, "bf16": 2}.get(settings.weights, itemsize))
    blocks = blocks_wanted(config, held, settings)
    cache = blocks * bytes_per_block(config, held, settings.block_size)
    if device == "cpu":
        buffers = pass_bytes(config, held, min(settings.token_budget, blocks * settings.block_size))
        _check_memory(folder, settings, cache, buffers)
    model, tokenizer = load(folder, device, partial(turn, weights=settings.weights))
    engine = engine_for(model, tokenizer, settings, domain)
    engine.name = name
    return engine


def engine_for(
    model: Decoder, tokenizer: Tokenizer, settings: Settings | None = None, domain: str | None = None
) -> Engine:
    """An engine over a model in memory, whose weights it holds as ``settings`` say. Raises UserError as above."""
    settings = settings or Settings()
    hold(model, settings.weights)
    itemsize = model.embedding.weight.element_size()
    blocks = blocks_wanted(model.config, itemsize, settings)
    runner = BlockRunner(model, settings, blocks, domain)
    engine = Engine(runner, tokenizer, settings, blocks)
    cache = blocks * bytes_per_block(model.config, itemsize, settings.block_size)
    engine.about = _about(model, runner, settings, cache)
    return engine


def _check_memory(folder: Path, settings: Settings, cache: int, buffers: float) -> None:
    weights = _most_bytes(folder, settings.weights)
    needed, free = weights + cache + buffers, available_memory()
    if free is not None and needed > free:
        smaller = "" if settings.weights == "int4" else ", or hold --weights int4"
        raise UserError(
            f"{folder}: weights take {weights / GIB:.2f} GiB, a pass of {settings.token_budget} tokens "
            f"{buffers / GIB:.2f} GiB and keys and values {cache / GIB:.2f} GiB, but {free / GIB:.2f} GiB of memory "
            f"are free: lower --kv-memory, --token-budget or --max-running{smaller}"
        )


def _most_bytes(folder: Path, weights: str) -> int:
    """Of the weights, while they are turned into ``weights``: all as they will be, and a layer, or what lies outside of
    the layers, as it is stored. Raises UserError as ``load`` does."""
    model = outline(folder).sized()
    layers, stored = [_bytes(layer) for layer in model.blocks], _bytes(model)
    if weights == "as stored":
        return stored
    turn(model, weights)
    return _bytes(model) + max(stored - sum(layers), *layers)


def _bytes(module: nn.Module) -> int:
    return sum(bytes_by_class(module).values())


def available_memory() -> int | None:
    """Bytes that Linux would give without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _about(model: Decoder, runner: BlockRunner, settings: Settings, cache: int) -> str:
    """One line: how large, held as what, how it runs."""
    held = sum(runner.bytes.values())
    experts = "" if not runner.experts else f", {sum(runner.experts.values())} experts in {len(runner.experts)} layers"
    fused = len(model.stack) - len(runner.unfused)
    how = f"our decoder, {fused} of {len(model.stack)} layers in one native call"
    weights = f"{held / GIB:.2f} GiB of weights ({settings.weights})"
    return f"{weights}{experts}; {how}; {cache / GIB:.2f} GiB for keys and values"
