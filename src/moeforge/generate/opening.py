"""From a folder to a running engine."""

from pathlib import Path

from moeforge.generate.engine import Engine
from moeforge.generate.runner import BlockRunner, blocks_wanted, bytes_per_block
from moeforge.generate.settings import Settings
from moeforge.hub import load
from moeforge.models import Decoder
from moeforge.models.weights import hold


def open_engine(
    folder: str | Path, settings: Settings | None = None, device: str = "cpu", domain: str | None = None
) -> Engine:
    """An engine over the model in ``folder``. Raises UserError as ``hub.load`` and ``BlockRunner`` do."""
    settings = settings or Settings()
    model, tokenizer = load(folder, device)
    hold(model, settings.weights)
    blocks = blocks_wanted(model, settings)
    runner = BlockRunner(model, settings, blocks, domain)
    engine = Engine(runner, tokenizer, settings, blocks, Path(folder).resolve().name)
    engine.about = _about(model, runner, settings, blocks)
    return engine


def _about(model: Decoder, runner: BlockRunner, settings: Settings, blocks: int) -> str:
    """One line: how large, held as what, how it runs."""
    held = sum(runner.bytes.values())
    experts = "" if not runner.num_experts else f", {runner.num_experts} experts in {len(model.moe_layers)} layers"
    fused = len(model.stack) - len(runner.unfused)
    how = f"{fused} of {len(model.stack)} layers in one native call each"
    cache = blocks * bytes_per_block(model, settings.block_size) / 2**30
    weights = f"{held / 2**30:.2f} GiB of weights ({settings.weights})"
    return f"{weights}{experts}; {how}; {cache:.2f} GiB for keys and values"
