"""Counts of what each expert takes, against a loop over tokens."""

import math

import pytest
import torch

from moeforge.analyze.kinds import KINDS
from moeforge.analyze.routing import Usage, lift, tally
from moeforge.data.packing import Packed, evaluation_batches
from moeforge.models import Decoder, ModelConfig

VOCAB = 11


def with_heads(heads: int) -> Decoder:
    moe = {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": {"k": 2}}, "heads": heads}
    config = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 3, "num_heads": 2, "first_dense_layers": 1, "moe": moe}
    return Decoder(ModelConfig.model_validate(config)).eval()


@pytest.fixture
def model() -> Decoder:
    return with_heads(1)


@pytest.fixture
def packed() -> Packed:
    ids = torch.randint(VOCAB, (75,), dtype=torch.int32)
    starts, one_each = torch.tensor([0, 30]), torch.ones(75, dtype=torch.int32)
    return Packed(ids, starts, one_each, torch.zeros(2, dtype=torch.int64), ids[:1], ids[0])


@pytest.mark.parametrize("heads", [1, 4])
def test_counts_equal_a_loop_over_tokens(heads: int, packed: Packed) -> None:
    model = with_heads(heads)
    kinds_N = torch.randint(len(KINDS), (75,), dtype=torch.int32)
    usage = tally(model, packed, kinds_N, seq_len=16, batch_size=2)
    assert sorted(usage) == [1, 2]
    by_kind = {layer: torch.zeros(4, len(KINDS), dtype=torch.int64) for layer in usage}
    by_token = {layer: torch.zeros(4, VOCAB, dtype=torch.int64) for layer in usage}
    for row, batch in enumerate(evaluation_batches(packed, 1, 16)):
        for layer, routing in model(batch.input_ids, position=batch.position, document=batch.document).routings.items():
            for token, expert in zip(routing.route.token.tolist(), routing.route.expert.tolist(), strict=True):
                place = row * 16 + token // heads
                if place < 74:  # the last token has no target, and what follows is padding
                    by_kind[layer][expert, kinds_N[place]] += 1
                    by_token[layer][expert, packed.ids[place]] += 1
    for layer, used in usage.items():
        assert torch.equal(used.by_kind, by_kind[layer])
        assert torch.equal(used.by_token, by_token[layer])
        assert used.by_kind.sum() == used.by_token.sum() == 2 * 74 * heads


def test_part_of_a_text_is_spread_over_it(model: Decoder, packed: Packed) -> None:
    kinds_N = torch.arange(75, dtype=torch.int32) // 16  # the number of the window
    usage = tally(model, packed, kinds_N, seq_len=16, max_tokens=32)[1]
    assert usage.by_kind.sum(0).tolist() == [32, 0, 32, 0, 0, 0, 0]


def test_a_dense_model_has_no_usage(packed: Packed) -> None:
    dense = Decoder(ModelConfig(vocab_size=VOCAB, d_model=16, num_layers=1, num_heads=2)).eval()
    assert tally(dense, packed, torch.zeros(75, dtype=torch.int32), seq_len=16) == {}


def test_lift_is_the_share_over_the_average_share() -> None:
    counts = torch.tensor([[3, 1, 0], [1, 3, 0], [0, 0, 0]])
    found = lift(counts)
    assert found[:2, :2].tolist() == [[1.5, 0.5], [0.5, 1.5]]
    assert found[2].isnan().all() and found[:, 2].isnan().all()


def test_typical_tokens_are_those_that_set_an_expert_apart() -> None:
    by_token = torch.tensor([[50, 40, 10, 0], [50, 0, 0, 2], [0, 0, 0, 0]])
    usage = Usage(by_token, by_token)
    assert usage.typical(5) == [[1, 2], [0, 3], []]
    assert usage.typical(1) == [[1], [0], []]
    assert math.isclose(float(usage.lift[0, 1]), 0.4 / (40 / 152))
