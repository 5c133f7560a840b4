"""transformers: ``generate`` of a batch, its experts, attention and cache as they come."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeforge.cli.contestants import Job, Texts, Write, take_turns


def opened(job: Job) -> tuple[Write, float]:
    """A model whose weights have the type asked for."""
    import torch

    from moeforge.hub.bridge import open_theirs

    torch.set_num_threads(job.threads)
    model = open_theirs(Path(job.path), {"bf16": torch.bfloat16, "float32": torch.float32}[job.weights])

    def write(prompts: Sequence[Sequence[int]], new: int) -> Texts:
        return _write(model, prompts, new)

    return write, job.active_share * sum(weight.nbytes for weight in model.parameters())


def _write(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Texts:
    import torch

    moments: list[float] = []

    def clock(input_ids: torch.Tensor, scores: object) -> torch.Tensor:
        """Asked after every token whether to stop."""
        moments.append(time.perf_counter() - started)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    started = time.perf_counter()
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=-1,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
    return {"tokens": written[:, ids.shape[1] :].tolist(), "times": [moments for _ in prompts]}


if __name__ == "__main__":
    take_turns(opened)
