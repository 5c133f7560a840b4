"""Models of transformers with random weights that decide clearly, and their weights under our names."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moeforge.config import build
from moeforge.models import Decoder, ModelConfig

OURS_TO_THEIRS = [
    (r"^embedding\.", "model.embed_tokens."),
    (r"^output_bias", "lm_head.bias"),
    (r"^output\.", "lm_head."),
    (r"^blocks\.", "model.layers."),
    (r"^norm\.", "model.norm."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.", ".self_attn."),
    (r"_a_norm\.", "_a_layernorm."),
    (r"\.kv_a_proj\.", ".kv_a_proj_with_mqa."),
]
PLACES = {
    "router.gate.": ("gate.", "router."),
    "router.expert_bias": ("gate.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
    "banks.0.gate_up_bias": ("experts.gate_up_proj_bias",),
    "banks.0.down_bias": ("experts.down_proj_bias",),
    "banks.0.": ("experts.",),
    "shared.mlp.": ("shared_experts.", "shared_expert.", "../shared_mlp."),
    "shared.gate.": ("shared_expert_gate.",),
}
"""What stands below our ``moe``, and where it may stand in theirs, below ``mlp`` or ``block_sparse_moe``."""


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Matrices with rows of length about 1.5, vectors around what they start as; buffers of corrections too."""
    draw = torch.Generator().manual_seed(seed)
    corrections = {name: buffer for name, buffer in model.named_buffers() if "correction" in name}
    with torch.no_grad():
        for name, weight in {**dict(model.named_parameters()), **corrections}.items():
            noise = torch.randn(weight.shape, generator=draw)
            if "correction" in name or name.endswith(("bias", "sinks")):
                weight.copy_(0.5 * noise)
            elif weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                fan_in = weight.shape[1] if weight.ndim == 2 else min(weight.shape[1:])
                weight.copy_(1.5 * noise / fan_in**0.5)


def candidates(name: str) -> Iterator[str]:
    """Names that a tensor of ours may have in a model of transformers."""
    for ours, theirs in OURS_TO_THEIRS:
        name = re.sub(ours, theirs, name)
    above, found, below = name.partition(".moe.")
    if not found:
        yield name
        return
    for ours, places in PLACES.items():
        if below.startswith(ours):
            for place in places:
                for moe in ("mlp", "block_sparse_moe"):
                    path = f"{above}.{moe}.{place}{below.removeprefix(ours)}"
                    yield re.sub(r"[^.]+\.\.\./|\.[^.]+\.\.\./", ".", path)
            return


def look_up(name: str, theirs: dict[str, Tensor]) -> Tensor:
    """The tensor of theirs that is ours of this name."""
    for candidate in candidates(name):
        halves = [candidate.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]
        fused = candidate.replace("gate_up_proj", "input_linear").replace("down_proj", "output_linear")
        for one in (candidate, fused):
            if one in theirs:
                return theirs[one]
        if halves[0] in theirs:
            return torch.cat([theirs[half] for half in halves])
    raise KeyError(f"{name}: none of {list(candidates(name))}")


def ours_of(theirs: Any, tree: dict[str, Any], interleaved: bool = False) -> Decoder:
    """Our decoder of this config, with their weights; ``interleaved`` experts are transposed, gate and up in turns."""
    model, state = Decoder(build(ModelConfig, tree)), theirs.state_dict()
    weights = {name: look_up(name, state) for name in model.state_dict()}
    corrections = [name for name in weights if name.endswith("expert_bias")]
    weights |= {name: weights[name].flatten() for name in corrections}
    for name, weight in weights.items() if interleaved else ():
        if ".banks." in name:
            weight = weight.transpose(1, 2) if weight.ndim == 3 else weight
            weights[name] = torch.cat((weight[:, ::2], weight[:, 1::2]), 1) if "gate_up" in name else weight
    model.load_state_dict({name: weight.contiguous() for name, weight in weights.items()})
    return model.eval()
