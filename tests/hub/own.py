"""Small models of our own type, each with something that no public class has."""

from pathlib import Path

import torch

from moeforge.data.tokenizers import Bytes, Tokenizer, train_or_open
from moeforge.hub import save
from moeforge.models import Decoder, ModelConfig

SHAPE = {
    "vocab_size": 257,
    "d_model": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 64,
    "d_ff": 16,
    "first_dense_layers": 1,
    "init": {"type": "normal", "std": 0.3},
}
PYRAMID = {
    "moe": {
        "experts": {"num_experts": 4, "d_expert": 8},
        "shared": {"d_expert": 8, "mix": "coefficient"},
        "router": {"controller": "expert_bias"},
    },
    "layers": {2: {"moe": {"experts": {"num_experts": 8}}}},
}
BY_TOKEN = {"gate": {"type": "lookup", "by": "token", "num_ids": 257}}
SHAPES = {
    "pyramid with residual experts": PYRAMID,
    "mixed routers": {
        "moe": {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": "top_p"}},
        "layers": {2: {"moe": {"router": BY_TOKEN}}, 0: {"attends": False}},
        "tie_embeddings": False,
    },
    "windows, passed twice": {**PYRAMID, "num_repeats": 2, "window": 5},
    "latent attention": {
        **PYRAMID,
        "num_kv_heads": None,
        "attention": {
            **{"type": "latent", "kv_lora_rank": 8, "q_lora_rank": None},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        },
    },
}
"""What is special -> the settings that make it so."""
COMPARES = {"moe": {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": "expert_choice", "losses": []}}}
IN_BLOCKS = {"moe": {"experts": {"num_experts": 4, "d_expert": 8}, "token_block": 3}}


def build(changes: dict[str, object], seed: int = 1) -> Decoder:
    """Weights so large that every token and every expert changes what comes next."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig.model_validate(SHAPE | changes)).eval()
    for moe in model.moe_layers.values():
        if moe.router.expert_bias is not None:
            moe.router.expert_bias += 0.1 * torch.randn_like(moe.router.expert_bias)
    return model


def tokenizer() -> Tokenizer:
    """257 tokens."""
    return train_or_open(Bytes(), [])


def write(folder: Path, changes: dict[str, object] = PYRAMID) -> Path:
    """A model folder."""
    save(build(changes), tokenizer(), folder)
    return folder


def padded(model: Decoder, rows: int = 43) -> Decoder:
    """The model with a vocabulary rounded up: ids that no tokenizer has, one half of them likelier than all others."""
    wider = Decoder(model.config.replace(vocab_size=(model.config.vocab_size or 0) + rows)).eval()
    weights, sign = model.state_dict(), (-1.0) ** torch.arange(rows)[:, None]
    for name in {"embedding.weight", "output.weight"} & weights.keys():
        weights[name] = torch.cat((weights[name], 10 * sign.expand(-1, model.config.d_model)))
    wider.load_state_dict(weights)
    return wider
