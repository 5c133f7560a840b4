"""Numbers about a load, by hand."""

import pytest
import torch

from moeforge.moe.stats import dead_experts, load_entropy, max_load


@pytest.mark.parametrize(
    ("counts", "entropy", "dead", "most"),
    [
        ([5, 5, 5, 5], 1.0, 0, 1.0),
        ([8, 0, 0, 0], 0.0, 3, 4.0),
        ([4, 4, 0, 0], 0.5, 2, 2.0),
        ([0, 0], 0.0, 2, 0.0),
        ([7], 1.0, 0, 1.0),
    ],
)
def test_loads(counts: list[int], entropy: float, dead: int, most: float) -> None:
    counts_E = torch.tensor(counts)
    assert load_entropy(counts_E) == pytest.approx(entropy)
    assert dead_experts(counts_E) == dead
    assert max_load(counts_E) == pytest.approx(most)
