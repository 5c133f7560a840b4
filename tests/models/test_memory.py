"""The estimate of a step's memory against what autograd really saves."""

import pytest
import torch

from moeforge.config import build, merge
from moeforge.models import Decoder
from moeforge.models.memory import activation_bytes
from moeforge.train import RunConfig

BASE = {
    "batch_size": 4,
    "seq_len": 128,
    "dtype": "float32",
    "model": {"vocab_size": 64, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 96},
}
EXPERTS = {"experts": {"num_experts": 8, "d_expert": 48}, "shared": {"d_expert": 64}}


def estimated(config: RunConfig) -> float:
    width = 2 if config.dtype == "bfloat16" else 4
    return activation_bytes(config.model, width, config.batch_size * config.seq_len, config.recompute_activations)


def saved_bytes(config: RunConfig) -> int:
    """Storage that one forward pass keeps for the backward pass, less the weights."""
    model = Decoder(config.model)
    model.recompute_activations = config.recompute_activations
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 64, (config.batch_size, config.seq_len))
    bf16 = config.dtype == "bfloat16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    assert loss.requires_grad
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"model": {"moe": EXPERTS}},
        {"model": {"moe": EXPERTS}, "dtype": "bfloat16"},
        {"model": {"num_layers": 4, "num_repeats": 3, "layers": {1: {"attends": False}, 2: {"attends": False}}}},
    ],
    ids=["dense", "dense bf16", "experts", "experts bf16", "repeated, half without attention"],
)
def test_the_estimate_is_near_what_is_kept(changes):
    config = build(RunConfig, merge(BASE, changes))
    estimate, measured = estimated(config), saved_bytes(config)
    assert 0.6 < estimate / measured < 1.6, (estimate, measured)


def test_recomputing_needs_less():
    config = build(RunConfig, BASE)
    saving = config.replace(recompute_activations=True)
    assert estimated(saving) < 0.7 * estimated(config)
