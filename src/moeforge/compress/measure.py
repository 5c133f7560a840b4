"""What compression cost, measured on the folder as it lies on disk: bytes, bits per byte, distance to the original."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.compress.stream import Streamed, Tell, Text, silent
from moeforge.compress.write import kind_of
from moeforge.data.packing import IGNORED, Batch
from moeforge.errors import UserError
from moeforge.hub.shards import Shards
from moeforge.models import Decoder
from moeforge.models.decoder import Cache

WRITTEN = 32
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

    @property
    def loss(self) -> float:
        """By what share bits per byte grew."""
        return self.bits_after / self.bits_before - 1


class Reference:
    """The original's last hidden states over a text, made layer by layer."""

    def __init__(self, streamed: Streamed, batches: Sequence[Batch], tell: Tell = silent) -> None:
        if not batches:
            raise UserError("there is no text to measure on")
        outside = streamed.outside()
        self.batches, self.head = batches, streamed.head(outside)
        text = Text.of(batches, outside, streamed.config)
        for index in range(streamed.config.num_layers):
            for _ in text.pass_layer(streamed.block(streamed.layer(index), index), streamed.config):
                pass
            tell(index)
        self.x = text.x

    @torch.no_grad()
    def compare(self, model: Decoder) -> Quality:
        """What ``model`` says of the same text."""
        sums = torch.zeros(4, dtype=torch.float64)
        num_bytes = sum(batch.num_bytes for batch in self.batches)
        for batch, x in zip(self.batches, self.x, strict=True):
            output = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
            sums += _compare(self.head.logits(x).flatten(0, 1), output.logits.flatten(0, 1), batch.labels.flatten())
        count = sum(batch.num_targets for batch in self.batches)
        bits = (sums[:2] / math.log(2) / num_bytes).tolist()
        return Quality(*bits, *(sums[2:] / count).tolist(), tokens=count)


def _compare(before_TV: Tensor, after_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[4] sums over targets: nats of both, divergence, equal best guesses."""
    kept_T = labels_T != IGNORED
    before_TV, after_TV = (logits[kept_T].float().log_softmax(-1) for logits in (before_TV, after_TV))
    target_T = labels_T[kept_T]
    divergence = F.kl_div(after_TV, before_TV, reduction="sum", log_target=True)
    same = (before_TV.argmax(-1) == after_TV.argmax(-1)).sum()
    nats = [F.nll_loss(logits, target_T, reduction="sum") for logits in (before_TV, after_TV)]
    return torch.stack([*nats, divergence, same.float()]).double()


def bytes_on_disk(folder: Path) -> dict[str, int]:
    """Bytes of the weight files by class, as ``Job.bytes_by_class`` predicts them."""
    shards = Shards(folder)
    sums = dict.fromkeys(("experts", "dense", "embeddings", "router", "other"), 0)
    for name, shape in shards.shapes.items():
        sums[kind_of(name, tuple(shape))] += shards.nbytes(name)
    whole = sum(file.stat().st_size for file in {*shards.file_of.values()})
    sums["other"] += whole - sum(sums.values())
    return sums


@torch.no_grad()
def tokens_per_second(model: Decoder) -> float:
    """Of one text being written, after a first pass."""
    ids, cache = torch.arange(8)[None] % model.embedding.num_embeddings, Cache(model, 1, 8 + 2 * WRITTEN)
    model(ids, cache=cache)
    for _ in range(WRITTEN // 4):
        model(ids[:, :1], cache=cache)
    start = time.perf_counter()
    for _ in range(WRITTEN):
        model(ids[:, :1], cache=cache)
    return WRITTEN / (time.perf_counter() - start)
