"""Self-contrast against two whole models, one of them with other routers, and what it must never do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.generate import Contrast
from moeforge.generate.contrast import contrasted, weaker
from moeforge.models import Decoder, ModelConfig
from moeforge.models.weights import hold
from tests.generate.driving import TOKENIZER, drive, engine, sampling
from tests.generate.test_isolation import PROMPT, SHAPE, small

VALUES = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5)


@given(values=VALUES, others=VALUES, beta=st.floats(0, 3), alpha=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_formula(values: list[float], others: list[float], beta: float, alpha: float) -> None:
    strong, weak = torch.tensor(values), torch.tensor(others)
    mixed = contrasted(strong, weak, Contrast(beta=beta, alpha=alpha))
    probs = strong.double().softmax(0)
    for token in range(5):
        if probs[token] > alpha * probs.max() * 1.001:
            assert float(mixed[token]) == pytest.approx((1 + beta) * values[token] - beta * others[token], abs=1e-4)
        elif probs[token] < alpha * probs.max() * 0.999:
            assert mixed[token] == -torch.inf
    if beta == 0:
        assert mixed.argmax() == strong.argmax()


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_weak_pass_is_the_model_with_one_expert_of_that_rank(rank: int) -> None:
    model = small()
    router = SHAPE["moe"]["router"] | {"select": {"k": 1, "skip": rank - 1}}  # type: ignore[index]
    other = Decoder(ModelConfig.model_validate(SHAPE | {"moe": SHAPE["moe"] | {"router": router}})).eval()  # type: ignore[operator]
    other.load_state_dict(model.state_dict())
    weak, ids = weaker(model, rank), torch.tensor([PROMPT])
    assert torch.equal(weak(ids).logits, other(ids).logits)
    assert all(a is b for a, b in zip(model.parameters(), weak.parameters(), strict=True))
    assert not torch.equal(model(ids).logits, weak(ids).logits)


@pytest.mark.parametrize("fused", [True, False], ids=["in one call", "module by module"])
def test_the_engine_writes_what_two_whole_passes_say(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr("moeforge.generate.runner.fuse", lambda model, blocks: {})
    model, contrast = small(), Contrast(beta=0.7, alpha=0.05, rank=2)
    weak, ids = weaker(model, 2), [*PROMPT]
    for _ in range(8):
        read = torch.tensor([ids])
        told = contrasted(model(read).logits[0, -1], weak(read).logits[0, -1], contrast)
        told[TOKENIZER.eos_id] = -torch.inf
        ids.append(int(told.argmax()))
    with engine(model, token_budget=5) as running:
        (got,) = drive(running, [(PROMPT, sampling(temperature=0, contrast=contrast))])
        (plain,) = drive(running, [(PROMPT, sampling(temperature=0))])
        nothing = [{"beta": 0.0}, {"beta": 2.0, "alpha": 1.0}]
        same = drive(running, [(PROMPT, sampling(temperature=0, contrast=one)) for one in nothing])
    assert list(got.tokens) == ids[len(PROMPT) :] != list(plain.tokens)
    assert all(one[:2] == plain[:2] for one in same), "beta 0, and only the likeliest token, are plain greedy text"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_held_weights_are_shared_as_well(weights: str) -> None:
    model = small(d_model=128).bfloat16()
    hold(model, weights)
    with engine(model) as running:
        (got,) = drive(running, [(PROMPT, sampling(contrast={"rank": 2}))])
    assert len(got.tokens) == 8


def test_what_has_no_such_expert_is_refused() -> None:
    dense = small(moe=None, d_ff=16)
    for model, message in (
        (small(), r"layer 0 has no expert of rank 9: select\.k = 1 after the 8 of select\.skip is more than the 8"),
        (dense, "no experts to hold against each other"),
        (small(moe=SHAPE["moe"] | {"router": {"select": "top_p"}}), "one of these is 'top_p'"),  # type: ignore[operator]
    ):
        with engine(model) as running, pytest.raises(UserError, match=message):
            drive(running, [(PROMPT, sampling(contrast={"rank": 9}))])
