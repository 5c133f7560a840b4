"""The engine's passes for families without a table of ours: each text by itself, by transformers.

Texts share no pass and no cache, prompts are read whole, and no text is ever pushed out, so that none can feel another.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate.engine import Engine
from moeforge.generate.runner import Passed, wants_all
from moeforge.generate.sample import Sampling
from moeforge.generate.schedule import Piece, Text
from moeforge.generate.settings import Settings
from moeforge.hub.bridge import open_bridged
from moeforge.hub.folder import open_tokenizer

TYPES = {"as stored": None, "float32": torch.float32, "bf16": torch.bfloat16}


class BridgedRunner:
    """A model of transformers. It does not tell which experts a token took."""

    def __init__(self, model: Any, max_len: int) -> None:
        self.model, self.max_len, self.experts = model, max_len, dict[int, int]()
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self._caches: WeakKeyDictionary[Text, Any] = WeakKeyDictionary()

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece], show_experts: bool = False) -> Passed:
        """Reads the pieces, one after the other."""
        return Passed([self._read(piece) for piece in pieces], None, {})

    def _read(self, piece: Piece) -> Tensor:
        # The model makes its own kind of cache where it is given none.
        cache = self._caches[piece.text] if piece.start else None
        ids = torch.tensor([piece.text.tokens[piece.start : piece.end]], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        self._caches[piece.text] = output.past_key_values
        logits = output.logits[0] if wants_all(piece) else output.logits[0, -1:]
        return logits.float().cpu()

    def check(self, sampling: Sampling) -> None:
        """Raises UserError for a contrast: transformers' routers are its own."""
        if sampling.contrast is not None:
            raise UserError("contrast: a model that runs through the bridge cannot take another expert")


def open_bridged_engine(folder: Path, settings: Settings, domain: str | None = None) -> Engine:
    """An engine over a folder that transformers can open. Raises UserError as ``open_bridged`` does."""
    if settings.weights not in TYPES:
        raise UserError(
            f"weights {settings.weights}: {folder} is of a family without a table of ours and runs through the bridge, "
            f"which holds weights as {', '.join(TYPES)}"
        )
    if domain is not None:
        raise UserError(f"this model knows no domains: leave '{domain}' out")
    model, how = open_bridged(folder, TYPES[settings.weights])
    engine = bridged_engine_for(model, how, open_tokenizer(folder), settings)
    engine.name = folder.resolve().name
    return engine


def bridged_engine_for(model: Any, how: str, tokenizer: Tokenizer, settings: Settings) -> Engine:
    """An engine over a model of transformers in memory; ``how`` it runs, in words."""
    config = model.config.get_text_config()
    max_len = int(getattr(config, "max_position_embeddings", None) or 4096)
    # Room for all texts at their longest: transformers' caches grow by themselves, and nobody is ever pushed out.
    blocks = settings.max_running * -(-max_len // settings.block_size)
    changes = {"prefix_reuse": False, "token_budget": settings.max_running * max_len, "kv_blocks": blocks}
    engine = Engine(BridgedRunner(model, max_len), tokenizer, settings.replace(**changes), blocks)
    engine.about = f"{how}, one request at a time"
    return engine
