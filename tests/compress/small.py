"""A small model of our own, and a text, to compress."""

from pathlib import Path

import torch

from moeforge.data.document import Document
from moeforge.data.packing import Batch, evaluation_batches, pack
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.hub import save
from moeforge.models import Decoder, ModelConfig

SHAPE = {
    **{"vocab_size": 257, "d_model": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 64, "d_ff": 32},
    **{"first_dense_layers": 1, "init": {"type": "normal", "std": 0.3}},
    "moe": {"experts": {"num_experts": 4, "d_expert": 24}, "router": {"select": {"k": 2}}},
    "layers": {2: {"moe": {"experts": {"num_experts": 6}, "router": {"controller": "expert_bias"}}}},
}
"""A dense layer, then two with experts, of which the second has more and a bias on selection."""


def model_folder(folder: Path, **changes: object) -> Path:
    torch.manual_seed(3)
    model = Decoder(ModelConfig.model_validate(SHAPE | changes)).eval()
    save(model, train_or_open(Bytes(), []), folder)
    return folder


def batches(length: int = 600) -> list[Batch]:
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(length))
    return list(evaluation_batches(pack([Document("one", text)], train_or_open(Bytes(), [])), 4, 32))
