"""What a request gets does not depend on the others, bit for bit: alone, beside anything, cut up in any way."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import Settings
from moeforge.generate.runner import BlockRunner
from moeforge.hub import open_model
from moeforge.hub.families import FAMILIES
from moeforge.models import Decoder, ModelConfig
from moeforge.models.weights import hold
from moeforge.recipes.catalogue import RECIPES, load
from tests.generate.driving import drive, engine, sampling

PROMPT = [256, *b"def first(self):"]
"""17 tokens: one full block and one more."""
SHAPE = {
    **{"vocab_size": 257, "d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 128},
    "init": {"type": "normal", "std": 0.3},
    "moe": {
        "experts": {"num_experts": 8, "d_expert": 32},
        "router": {"select": {"k": 2}},
        "shared": {"d_expert": 32},
    },
}
WEIGHTS = ("float32", "bf16", "int8", "int4")


def small(**changes: object) -> Decoder:
    torch.manual_seed(3)
    return Decoder(ModelConfig.model_validate(SHAPE | changes)).eval()


def held(weights: str) -> Decoder:
    model = small(d_model=128)
    if weights.startswith("int"):
        model = model.bfloat16()
    hold(model, weights)
    return model


def others(seed: int, count: int = 4) -> Iterator[tuple[list[int], object]]:
    draw = random.Random(seed)
    for index in range(count):
        yield [draw.randrange(257) for _ in range(draw.randrange(1, 40))], sampling(seed + index)


def same_alone_and_beside(model: Decoder, prompt: list[int], **settings: object) -> None:
    mine = (prompt, sampling(7))
    with engine(model, prefix_reuse=False) as quiet:
        (alone,) = drive(quiet, [mine])
    with engine(model, token_budget=7, **settings) as busy:
        crowd = [*others(1), mine, *others(11)]
        beside = drive(busy, crowd)[4]
        again = drive(busy, [mine, *others(21)])[0]  # now with what the first time left behind
    assert beside[:2] == alone[:2] == again[:2]
    assert len(alone.tokens) == 8


@pytest.mark.parametrize("weights", WEIGHTS)
def test_whatever_the_weights_are_held_as(weights: str) -> None:
    same_alone_and_beside(held(weights), PROMPT)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_latent_attention_with_weights_held(weights: str) -> None:
    latent = {"type": "latent", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    model = small(d_model=128, num_kv_heads=None, attention=latent).bfloat16()
    hold(model, weights)
    same_alone_and_beside(model, PROMPT)


def test_contrasted_texts_and_those_beside_them() -> None:
    model, against = small(), {"contrast": {"beta": 0.5, "rank": 3}}
    mine, plain = (PROMPT, sampling(7, **against)), (PROMPT, sampling(7))
    with engine(model, prefix_reuse=False) as quiet:
        alone = [drive(quiet, [job])[0] for job in (mine, plain)]
    other = (PROMPT, sampling(9, contrast={"rank": 1}))
    with engine(model, token_budget=7) as busy:
        for _ in range(2):  # the second time with what the first one left behind
            beside = drive(busy, [*others(1), plain, mine, other, *others(11)])
            assert [got[:2] for got in (beside[5], beside[4])] == [got[:2] for got in alone]
    assert alone[0].tokens != alone[1].tokens


@pytest.mark.parametrize("fused", [True, False], ids=["in one call", "module by module"])
def test_both_ways_a_layer_runs(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr("moeforge.generate.runner.fuse", lambda model, blocks: {})
    same_alone_and_beside(small(), PROMPT)


def recipe_model(name: str) -> Decoder:
    torch.manual_seed(5)
    config = load(name).model
    domains = ("code", "text") if name in ("task-moe", "task-aware-gating") else ()
    return Decoder(config.replace(vocab_size=257, domains=domains)).eval()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str) -> None:
    model = recipe_model(name)
    if model.cannot_write or any(layer.mixes_tokens for layer in model.config.all_layers):
        with pytest.raises(UserError, match=r"other tokens|blocks of tokens|later ones"):
            engine(model)
        return
    same_alone_and_beside(model, PROMPT)


@pytest.mark.parametrize("neighbour", ["the same text", "one token again and again", "a longer text of mine"])
def test_neighbours_who_mean_it(neighbour: str) -> None:
    """All to the same experts, the same start, the very same text: what a shared buffer or table would feel."""
    model = small()
    against = {
        "the same text": [(PROMPT, sampling(8))] * 6,
        "one token again and again": [([97] * 60, sampling(seed)) for seed in range(6)],
        "a longer text of mine": [([*PROMPT, *PROMPT], sampling(seed)) for seed in range(6)],
    }[neighbour]
    with engine(model) as one, engine(model) as other:
        (alone,) = drive(one, [(PROMPT, sampling(7))])
        assert drive(other, [*against, (PROMPT, sampling(7)), *against])[6][:2] == alone[:2]


def test_a_neighbour_without_numbers_fails_alone() -> None:
    model = small(tie_embeddings=False)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan  # who has this token has no numbers anywhere
    with engine(model) as quiet, engine(model, blocks=8) as busy:
        (alone,) = drive(quiet, [(PROMPT, sampling(7))])
        for _ in range(3):  # the second time in blocks that hold what the first one left
            broken, mine, also = drive(
                busy, [([256, 0, 5], sampling(1)), (PROMPT, sampling(7)), ([0] * 20, sampling(2))]
            )
            assert mine[:2] == alone[:2]
            assert broken.end.stop == also.end.stop == "failed" and "not finite" in str(broken.end.error)


@given(budget=st.integers(1, 40), blocks=st.integers(3, 12), reuse=st.booleans(), seed=st.integers(0, 99))
def test_any_budget_any_room_preemption_and_reuse(budget: int, blocks: int, reuse: bool, seed: int) -> None:
    """With three blocks texts of up to 48 tokens push each other out all the time."""
    prompts = [prompt[:25] for prompt, _ in others(seed)]
    jobs = [(prompt, sampling(index)) for index, prompt in enumerate(prompts)]
    with engine(MODEL, blocks=blocks, token_budget=budget, prefix_reuse=reuse, max_running=3) as busy:
        together = drive(busy, jobs)
    for job, got in zip(jobs, together, strict=True):
        with engine(MODEL, prefix_reuse=False) as quiet:
            assert drive(quiet, [job])[0][:2] == got[:2]


MODEL = small()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_preemption_happens_and_leaves_nothing_behind(weights: str) -> None:
    model, jobs = held(weights), [([256, *range(20)], sampling(seed, max_tokens=50)) for seed in range(4)]
    with engine(model, blocks=6, prefix_reuse=False) as busy:
        together = drive(busy, jobs)
        assert busy.report().preemptions > 0
        assert busy.report().blocks_used == 0
    for got, job in zip(together, jobs, strict=True):
        with engine(model) as quiet:
            assert got[:2] == drive(quiet, [job])[0][:2]
            assert quiet.report().preemptions == 0


def test_prefix_reuse_happens() -> None:
    with engine(MODEL) as running:
        first, second = (drive(running, [([*PROMPT, *range(40)], sampling(7))])[0] for _ in range(2))
        assert first[:2] == second[:2]
        assert (first.end.usage.reused_tokens, second.end.usage.reused_tokens) == (0, 48)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    with engine(MODEL) as running:
        (one,) = drive(running, [(PROMPT, sampling(7))])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with engine(MODEL) as running:
            assert drive(running, [(PROMPT, sampling(7)), *others(1)])[0][:2] == one[:2]
    finally:
        torch.set_num_threads(before)


def test_routers_that_compare_tokens_are_refused_unless_allowed() -> None:
    leaky = small(moe=SHAPE["moe"] | {"router": {"select": {"type": "expert_choice"}, "losses": []}})
    with pytest.raises(UserError, match="--unsafe-batch-dependent"):
        BlockRunner(leaky, Settings(), 8)
    BlockRunner(leaky, Settings(unsafe_batch_dependent=True), 8)


transformers = pytest.importorskip("transformers", reason="needs the families' own code: pip install 'moeforge[hf]'")


@pytest.mark.parametrize("family", [name for name, kind in FAMILIES.items() if kind.in_transformers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_every_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from tests.hub import families

    transformers.logging.disable_progress_bar()
    changes = next(iter(families.NATIVE[family].values()))
    families.build(family, **changes).to(dtype).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    prompt = [5, *range(10, 29)]
    tokenizer = numbered(model.config.vocab_size or 0)

    def job(seed: int, ids: list[int] = prompt) -> tuple[list[int], object]:
        return ids, sampling(seed)

    with engine(model, tokenizer=tokenizer, prefix_reuse=False) as quiet:
        (alone,) = drive(quiet, [job(7)])
    with engine(model, tokenizer=tokenizer, token_budget=7) as busy:
        crowd = [job(seed, [seed + 3, *range(30, 30 + 3 * seed)]) for seed in range(5)]
        assert drive(busy, [*crowd, job(7), *crowd])[5][:2] == alone[:2]
    assert alone.end.error is None and len(alone.tokens) == 8


def numbered(size: int) -> Tokenizer:
    """A token for each id, the number itself."""
    words = {str(number): number for number in range(size - 1)} | {"</s>": size - 1}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0")), size - 1)
