"""From a folder to a running engine."""

from pathlib import Path

from moeforge.generate.engine import Engine
from moeforge.generate.runner import BlockRunner, blocks_wanted
from moeforge.generate.settings import Settings
from moeforge.hub import load
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
    return Engine(runner, tokenizer, settings, blocks, Path(folder).resolve().name)
