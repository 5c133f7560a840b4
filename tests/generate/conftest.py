"""A small model with random weights and the byte tokenizer."""

import pytest
import torch

from moeforge.data.tokenizers import Bytes, Tokenizer, train_or_open
from moeforge.models import Decoder, ModelConfig

SHAPE = {
    "vocab_size": 257,
    "d_model": 16,
    "num_layers": 3,
    "num_heads": 2,
    "max_seq_len": 48,
    "first_dense_layers": 1,
    "d_ff": 16,
    "moe": {"experts": {"num_experts": 4, "d_expert": 8}},
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """257 tokens."""
    return train_or_open(Bytes(), ())


@pytest.fixture(scope="session")
def model() -> Decoder:
    """Weights large enough that every token changes what comes next."""
    torch.manual_seed(1)
    return Decoder(ModelConfig.model_validate({**SHAPE, "init": {"type": "normal", "std": 0.3}})).eval()


@pytest.fixture(scope="session")
def even_model() -> Decoder:
    """Nearly the same probability for every token, the end of the document included."""
    torch.manual_seed(2)
    return Decoder(ModelConfig.model_validate(SHAPE)).eval()
