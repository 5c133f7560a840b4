"""Training steps of small decoders, timed: what ``moeforge plan --profile`` fits a device to."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeforge.parallel.plan.job import Job
    from moeforge.parallel.ranks import Ranks
    from moeforge.train import RunConfig

SHAPES = ((64, 1), (64, 8), (128, 4), (256, 1), (256, 8), (512, 4))
"""Width of the stream, and sequences."""
LENGTH, VOCABULARY = 256, 1024
ROUNDS = 7


def timed_steps(config: "RunConfig", ranks: "Ranks") -> "list[tuple[Job, float]]":
    """Each job with the seconds of its step, the slowest process' median; all are at work at once, each by itself."""
    import torch

    from moeforge.config import build
    from moeforge.models import ModelConfig
    from moeforge.parallel.plan.job import Job
    from moeforge.train.loop import choose_device

    found, device = [], choose_device(config.device)
    half = config.dtype == "bfloat16"
    for width, rows in SHAPES:
        experts = {"experts": {"num_experts": 8, "d_expert": 2 * width}, "router": {"select": {"k": 2}}}
        tree = {"vocab_size": VOCABULARY, "d_model": width, "num_layers": 2, "d_ff": 4 * width, "moe": experts}
        model = build(ModelConfig, {**tree, "first_dense_layers": 1})
        seconds = ranks.gather(_median(model, rows, getattr(torch, config.dtype), device))
        found.append((Job(model, rows, LENGTH, half=half), max(seconds)))
    return found


def _median(model_config: object, rows: int, dtype: object, device: object) -> float:
    import torch

    from moeforge.data.packing import Batch
    from moeforge.models import Decoder
    from moeforge.train.config import AdamW
    from moeforge.train.optimizer import build_optimizer
    from moeforge.train.step import accumulate_gradients, apply_gradients

    model = Decoder(model_config).to(device)  # type: ignore[arg-type,call-overload]
    optimizer = build_optimizer(model, AdamW())
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH + 1))
    position = torch.arange(LENGTH).expand(rows, -1)
    zeros = torch.zeros_like(position)
    batch = Batch(ids[:, :-1], ids[:, 1:], zeros.int(), position, zeros, ids.numel()).to(device)  # type: ignore[arg-type]
    took = []
    for number in range(ROUNDS + 2):
        start = time.perf_counter()
        result = accumulate_gradients(model, [batch], dtype, number)  # type: ignore[arg-type]
        apply_gradients(model, optimizer, result, 1.0, number)
        if number > 1:
            took.append(time.perf_counter() - start)
    return sorted(took)[len(took) // 2]
