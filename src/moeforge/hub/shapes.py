"""Folders of random weights in the shapes of public models: for speed, which does not depend on what weights say."""

from pathlib import Path

import torch

from moeforge.config import Tree
from moeforge.data.corpora import Stdlib
from moeforge.data.tokenizers import BPE, train_or_open
from moeforge.errors import UserError
from moeforge.hub.families import FAMILIES
from moeforge.hub.pretrained import save_as
from moeforge.models import Decoder
from moeforge.models.init import without_memory

STD = 0.02
"""Of matrices, as transformers starts them: large enough that a router's choices differ from token to token."""

OLMOE = {"model_type": "olmoe", "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64}
OLMOE |= {"num_experts_per_tok": 8, "max_position_embeddings": 4096, "pad_token_id": None}
SHAPES: dict[str, Tree] = {
    "olmoe-1b": OLMOE | {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 10, "vocab_size": 32000},
    "olmoe-5m": OLMOE | {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 2048},
}
"""By name: ``config.json`` of the model. 1b has 1.1 B parameters, 0.2 B of them active; 5m is for a first try."""


def write_random(name: str, folder: Path) -> None:
    """Writes the model in bf16, and a tokenizer of the standard library's words. Raises UserError for unknown names."""
    if name not in SHAPES:
        raise UserError(f"there is no shape '{name}': {', '.join(SHAPES)}")
    shape = SHAPES[name]
    family = FAMILIES[shape["model_type"]]
    with without_memory():
        model = Decoder(family.read(shape, name))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=STD, generator=generator)
            else:
                parameter.fill_(1)
    words = train_or_open(BPE(vocab_size=shape["vocab_size"]), list(Stdlib().documents()))
    save_as(model, folder, family, tokenizer=words)
