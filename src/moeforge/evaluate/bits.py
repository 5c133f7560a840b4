"""Bits per byte of text: cross-entropy over the bytes that the tokens stand for, so tokenizers can be compared."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.theirs import Theirs
from moeforge.models import Decoder, Output


@dataclass(frozen=True)
class Score:
    """Sums over an evaluation."""

    nats: float
    num_bytes: int
    num_targets: int

    @property
    def bits_per_byte(self) -> float:
        """Lower is better; 8 is no better than guessing bytes."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer."""
        return math.exp(self.nats / self.num_targets)


def summed_loss(output: Output, labels_BL: Tensor) -> Tensor:
    """Summed cross-entropy in nats over all labels that are not -100."""
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, labels_BL.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def bits_per_byte(
    model: Decoder | Theirs,
    batches: Iterable[Batch],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Score:
    """Scores ``model`` on batches that cover a text once; on ``device``, where its weights are not where it computes.

    Raises UserError when there is no text.
    """
    device = device or model.embedding.weight.device
    was_training, nats, num_bytes, num_targets = model.training, 0.0, 0, 0
    model.eval()
    for batch in (batch.to(device) for batch in batches):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known)
        nats += summed_loss(output, batch.labels).item()
        num_bytes, num_targets = num_bytes + batch.num_bytes, num_targets + batch.num_targets
    model.train(was_training)
    if not num_bytes:
        raise UserError("there is no text to evaluate on")
    return Score(nats, num_bytes, num_targets)
