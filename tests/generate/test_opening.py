"""From a folder to an engine: what it holds, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import Settings, open_engine, opening
from moeforge.generate.runner import blocks_wanted, bytes_per_block
from moeforge.hub import read_config, save
from moeforge.hub.folder import open_model, outline
from moeforge.models import Decoder, ModelConfig
from moeforge.models.block import Block
from moeforge.models.decoder import Blocks
from moeforge.models.weights import BITS, TYPES, bytes_by_class, hold, turn
from tests.generate.conftest import SHAPE
from tests.generate.driving import drive, engine, sampling

PROMPT = [256, *b"def first"]


@pytest.fixture
def folder(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(model, tokenizer, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_it_writes_as_the_model_itself(folder: Path, model: Decoder) -> None:
    with open_engine(folder, Settings(kv_memory=0.001)) as opened, engine(model) as mine:
        assert opened.name == "tiny" and "GiB of weights (as stored), 8 experts in 2 layers" in opened.about
        (one,), (other,) = (drive(running, [(PROMPT, sampling(7))]) for running in (opened, mine))
        assert one[:2] == other[:2] and len(one.tokens) == 8


@pytest.mark.parametrize("weights", ["float32", "bf16", "int8", "int4"])
def test_as_anything_it_can_be_held_as(folder: Path, weights: str) -> None:
    with open_engine(folder, Settings(kv_memory=0.001, weights=weights)) as opened:
        assert len(drive(opened, [(PROMPT, sampling(7))])[0].tokens) == 8
        assert f"({weights})" in opened.about


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_block_are_those_of_the_pools(dtype: torch.dtype) -> None:
    sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    latent = {"attention": {"type": "latent", **sizes}}
    for changes in ({}, {"num_kv_heads": 1, "num_repeats": 2}, latent):
        config = ModelConfig.model_validate(SHAPE | changes)
        pools = [pool for layer in Blocks(Decoder(config).to(dtype), 3, 32).layers.values() for pool in layer.pools]
        assert sum(pool.nbytes for pool in pools) == 3 * bytes_per_block(config, dtype.itemsize, 32)


def test_blocks_are_as_many_as_memory_holds_and_texts_could_fill(model: Decoder) -> None:
    block = bytes_per_block(model.config, 4, 16)
    assert blocks_wanted(model.config, 4, Settings(max_running=2)) == 2 * 3  # of 48 tokens each
    assert blocks_wanted(model.config, 4, Settings(kv_memory=4.5 * block / 2**30)) == 4
    assert blocks_wanted(model.config, 4, Settings(kv_blocks=7)) == 7
    with pytest.raises(UserError, match="holds no block: one takes"):
        blocks_wanted(model.config, 4, Settings(kv_memory=0.5 * block / 2**30))


def test_what_does_not_fit_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(opening, "load")
    with pytest.raises(UserError, match=r"keys and values [\d.]+ GiB, but [\d.]+ GiB of memory are free"):
        open_engine(folder, Settings(kv_blocks=2**40))


def test_the_buffers_of_a_pass_count_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = read_config(folder)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    cache = 4 * bytes_per_block(config, 4, 16)
    logits = 4 * 64 * (config.vocab_size or 0)
    monkeypatch.setattr(opening, "available_memory", lambda: weights + cache + logits)
    with pytest.raises(UserError, match=r"a pass of 64 tokens [\d.]+ GiB .* lower --kv-memory, --token-budget"):
        open_engine(folder, Settings(kv_blocks=4, token_budget=64))
    open_engine(folder, Settings(kv_blocks=4, token_budget=1)).close()


def test_of_weights_that_are_rounded_one_layer_at_a_time_lies_in_memory(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, experts = tmp_path / "deep", {"experts": {"num_experts": 16, "d_expert": 128}}
    deep = SHAPE | {"d_model": 128, "num_layers": 4, "moe": experts}  # whole groups of 128 inputs
    save(Decoder(ModelConfig.model_validate(deep)), tokenizer, folder)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr(opening, "available_memory", lambda: stored * 0.7)
    with pytest.raises(UserError, match="hold --weights int4"):
        open_engine(folder, Settings(kv_blocks=4, token_budget=1))
    settled: list[Block] = []

    def noted(module: torch.nn.Module, weights: str) -> None:
        settled.extend([module] if isinstance(module, Block) else [])
        turn(module, weights)

    monkeypatch.setattr(opening, "turn", noted)
    open_engine(folder, Settings(kv_blocks=4, token_budget=1, weights="int4")).close()
    assert len(settled) == 4


SMALL = {"num_experts": 4, "d_expert": 32}
LATENT = {"type": "latent", "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}


@pytest.mark.parametrize("weights", ["as stored", *TYPES, *BITS])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "attention": LATENT},
        {"moe": {"experts": SMALL | {"bias": True}, "shared": {"d_expert": 16}}},
        {"moe": {"experts": SMALL, "router": {"select": {"type": "merged"}, "losses": []}}},
        {"moe": {"experts": [SMALL, {"type": "zero", "num_experts": 2}]}},
    ],
)
def test_bytes_are_known_before_anything_is_read(
    tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, object], weights: str
) -> None:
    save(Decoder(ModelConfig.model_validate(SHAPE | changes)).bfloat16(), tokenizer, tmp_path / "small")
    expected = outline(tmp_path / "small").sized()
    turn(expected, weights)
    assert bytes_by_class(expected) == hold(open_model(tmp_path / "small"), weights)


@pytest.mark.parametrize("weights", BITS)
def test_experts_that_stay_as_stored_count_as_stored(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    biased = {"experts": {"num_experts": 16, "d_expert": 64, "bias": True}}
    model = Decoder(ModelConfig.model_validate(SHAPE | {"num_layers": 4, "moe": biased}))
    save(model, tokenizer, tmp_path / "biased")
    monkeypatch.setattr(opening, "available_memory", lambda: bytes_by_class(model)["experts"])
    with pytest.raises(UserError, match="of memory are free"):
        open_engine(tmp_path / "biased", Settings(kv_blocks=4, token_budget=1, weights=weights))
