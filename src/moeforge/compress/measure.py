"""What compression cost, measured on the folder as it lies on disk: bits per byte, distance to the original, speed."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.compress.source import Source
from moeforge.compress.stream import Tell, silent
from moeforge.data.packing import IGNORED, Batch
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import ALONE, Sampling, Token, engine_for
from moeforge.generate.bridged import bridged_engine_for
from moeforge.hub.theirs import Theirs
from moeforge.models import Decoder

AT_ONCE = 256
"""Tokens whose distributions are compared at once: each is several times a vocabulary in float32."""
WRITTEN = 64
"""Tokens that are written to measure how fast."""


@dataclass(frozen=True)
class Quality:
    """Of both models on the same held-out text."""

    bits_before: float
    """Bits per byte of the original."""
    bits_after: float
    kl: float
    """Nats per token from the original's distribution to the compressed one's."""
    agreement: float
    """Share of tokens whose most likely next token is the same."""
    tokens: int
    experts_per_token: float
    """Of the compressed model, the mean over its layers with experts."""

    @property
    def loss(self) -> float:
        """By what share bits per byte grew."""
        return self.bits_after / self.bits_before - 1


class Reference:
    """The original's last hidden states over a text, made layer by layer."""

    def __init__(self, streamed: Source, batches: Sequence[Batch], tell: Tell = silent) -> None:
        if not batches:
            raise UserError("there is no text to measure on")
        self.batches, self.logits, text = batches, streamed.logits, streamed.text(batches)
        for index in range(streamed.config.num_layers):
            block: Any = streamed.block(index)
            text.pass_layer(block)
            tell(index)
        self.x = text.x

    @torch.no_grad()
    def compare(self, model: Decoder | Theirs) -> Quality:
        """What ``model`` says of the same text."""
        sums, edges, rows = torch.zeros(4, dtype=torch.float64), 0, 0
        num_bytes = sum(batch.num_bytes for batch in self.batches)
        for batch, x in zip(self.batches, self.x, strict=True):
            output = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
            parts = (tensor.flatten(0, 1).split(AT_ONCE) for tensor in (x, output.logits, batch.labels))
            for x_TD, after_TV, labels_T in zip(*parts, strict=True):
                sums += _compare(self.logits(x_TD), after_TV, labels_T)
            chosen = [int(routing.choices.sum()) for routing in output.routings.values()]
            chosen += [ids_TK.numel() for ids_TK, _ in output.taken.values()]
            edges, rows = edges + sum(chosen), rows + len(chosen) * batch.input_ids.numel()
        count = sum(batch.num_targets for batch in self.batches)
        bits = (sums[:2] / math.log(2) / num_bytes).tolist()
        return Quality(*bits, *(sums[2:] / count).tolist(), tokens=count, experts_per_token=edges / max(1, rows))


def _compare(before_TV: Tensor, after_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[4] sums over targets: nats of both, divergence, equal best guesses."""
    kept_T = labels_T != IGNORED
    before_TV, after_TV = (logits[kept_T].float().log_softmax(-1) for logits in (before_TV, after_TV))
    target_T = labels_T[kept_T]
    divergence = F.kl_div(after_TV, before_TV, reduction="sum", log_target=True)
    same = (before_TV.argmax(-1) == after_TV.argmax(-1)).sum()
    nats = [F.nll_loss(logits, target_T, reduction="sum") for logits in (before_TV, after_TV)]
    return torch.stack([*nats, divergence, same.float()]).double()


def tokens_per_second(model: Decoder | Theirs, tokenizer: Tokenizer) -> float | None:
    """Of one text that the engine writes, after a first one; None for models that it refuses, as they read ahead."""
    settings = ALONE.replace(unsafe_batch_dependent=True)
    try:
        if isinstance(model, Theirs):
            engine = bridged_engine_for(model.model, model.how, tokenizer, settings)
        else:
            engine = engine_for(model, tokenizer, settings, next(iter(model.config.domains), None))
    except UserError:
        return None
    with engine:
        sampling = Sampling(temperature=0, max_tokens=min(WRITTEN, engine.max_len - 1), ignore_end=True)
        rate = 0.0
        for _ in range(2):
            moments = [time.perf_counter() for event in engine.write([0], sampling) if isinstance(event, Token)]
            if len(moments) < 2:  # transformers may refuse to write with a model that it can read with
                return None
            rate = (len(moments) - 1) / (moments[-1] - moments[0])
        return rate
