"""Bits per byte: by hand on a model that knows nothing, and independent of batch shape."""

import math

import pytest
import torch

from moeforge.data.document import Document
from moeforge.data.packing import evaluation_batches, pack
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.errors import UserError
from moeforge.evaluate import bits_per_byte
from moeforge.models import Decoder, ModelConfig

DOCUMENTS = [Document("one", "to be or not to be"), Document("two", "é, 中 and 🙂 count by their bytes")]


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(vocab_size=257, d_model=16, num_layers=1, num_heads=2, d_ff=16)).double()


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token():
    uniform = model()
    torch.nn.init.zeros_(uniform.embedding.weight)
    packed = pack(DOCUMENTS, train_or_open(Bytes(), []))
    score = bits_per_byte(uniform, evaluation_batches(packed, 2, 8))
    num_bytes = sum(len(document.text.encode()) for document in DOCUMENTS)
    targets = num_bytes + 1  # the second document's start is a target, the first one's is not
    assert (score.num_bytes, score.num_targets) == (num_bytes, targets)
    assert score.bits_per_byte == pytest.approx(targets * math.log2(257) / num_bytes, rel=1e-6)
    assert score.perplexity == pytest.approx(257, rel=1e-6)


def test_the_score_does_not_depend_on_the_batch_size():
    packed = pack(DOCUMENTS, train_or_open(Bytes(), []))
    scores = [bits_per_byte(model(), evaluation_batches(packed, size, 8)).nats for size in (1, 3, 50)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_training_mode_is_put_back_and_no_text_is_an_error():
    packed, training = pack(DOCUMENTS, train_or_open(Bytes(), [])), model().train()
    bits_per_byte(training, evaluation_batches(packed, 2, 8))
    assert training.training
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(training, [])
