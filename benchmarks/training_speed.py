"""A training step of our decoder against transformers' OLMoE class at the same shape, type, batch and length.

Both train in plain PyTorch with fused AdamW in one process, interleaved; transformers runs its default experts
implementation (grouped_mm). ``python benchmarks/training_speed.py`` writes ``training_speed.json``.
"""

import argparse
from collections.abc import Callable

import torch
from report import interleaved, ratios, write
from transformers import OlmoeConfig, OlmoeForCausalLM

from moeforge.kernels.allocator import keep_freed_memory
from moeforge.models import Decoder, ModelConfig

SHAPES = {
    "d256 E16 k4 H128": {"d_model": 256, "num_experts": 16, "top_k": 4, "d_expert": 128, "num_layers": 4},
    "d512 E64 k8 H256": {"d_model": 512, "num_experts": 64, "top_k": 8, "d_expert": 256, "num_layers": 2},
    "d64 E16 k1 H128": {"d_model": 64, "num_experts": 16, "top_k": 1, "d_expert": 128, "num_layers": 4},
}
VOCABULARY, BATCH, LENGTH = 1024, 8, 256


def ours(shape: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
    """The decoder as OLMoE is built: experts in every layer, norms on queries and keys."""
    moe = {
        "experts": {"num_experts": shape["num_experts"], "d_expert": shape["d_expert"]},
        "router": {"select": {"k": shape["top_k"]}, "losses": []},
    }
    sizes = {"d_model": shape["d_model"], "num_layers": shape["num_layers"], "num_heads": shape["d_model"] // 32}
    config = ModelConfig.model_validate(
        {**sizes, "vocab_size": VOCABULARY, "qk_norm": True, "tie_embeddings": False, "moe": moe}
    )
    return Decoder(config).to(dtype)


def theirs(shape: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
    """transformers' class with the same sizes."""
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_expert"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["d_model"] // 32,
        num_experts=shape["num_experts"],
        num_experts_per_tok=shape["top_k"],
        tie_word_embeddings=False,
        attention_dropout=0.0,
    )
    return OlmoeForCausalLM(config).to(dtype)


def step(model: torch.nn.Module) -> Callable[[], None]:
    """One training step on random tokens: forward, cross-entropy, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))

    def run() -> None:
        logits = model(ids[:, :-1]).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def main() -> None:
    """Runs every shape and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results = {}
    for allocator in ("default", "keeps freed memory"):
        if allocator != "default":
            keep_freed_memory()
        for name, shape in SHAPES.items():
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                variants = {"moeforge": step(ours(shape, dtype)), "transformers": step(theirs(shape, dtype))}
                summary = ratios(interleaved(variants, rounds), over="transformers")
                results[f"{name} {str(dtype)[6:]}, allocator {allocator}"] = summary
                print(name, dtype, allocator, f"{summary['moeforge']['ratio']:.2f}", flush=True)
    write("training_speed", results)


if __name__ == "__main__":
    main()
