"""Every recipe: its model trains a step, its comparison exists, and its note says what is needed."""

import json

import pytest
import torch

from moeforge.cli.main import main
from moeforge.data.packing import Batch
from moeforge.models import Decoder, measure
from moeforge.recipes import RECIPES, load
from moeforge.recipes.reproduce import arms
from moeforge.train import RunConfig
from moeforge.train.optimizer import build_optimizer
from moeforge.train.step import accumulate_gradients, apply_gradients

VOCAB = 101


CATALOGUE = """
    P006 P011 P019 P020 P022 P023 P024 P025 P026 P027 P031 P034 P036 P037 P038 P039 P040 P042 P043 P046 P047 P048
    P049 P050 P051 P052 P053 P054 P055 P056 P057 P058 P059 P060 P061 P062 P063 P064 P066 P067 P068 P069 P070 P071
    P072 P073 P074 P075 P076 P077 P078 P079 P080 P082 P083 P085 P088 P090 P156 P193 P202
""".split()
"""The papers whose mechanism the catalogue must have."""


def test_every_paper_of_the_catalogue_has_a_recipe() -> None:
    notes = [load(name).recipe for name in RECIPES]
    assert not set(CATALOGUE) - {note.paper for note in notes if note}


def batch(rows: int = 2, length: int = 32) -> Batch:
    ids, position = torch.randint(VOCAB, (rows, length + 1)), torch.arange(length).expand(rows, length)
    document = torch.zeros(rows, length, dtype=torch.int32)
    return Batch(ids[:, :-1], ids[:, 1:], document, position, torch.zeros_like(position), num_bytes=rows * length)


def small(name: str) -> RunConfig:
    config = load(name)
    return config.replace(model=config.model.replace(vocab_size=VOCAB))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_a_step(name: str) -> None:
    torch.manual_seed(0)
    config = small(name)
    model = Decoder(config.model)
    optimizer = build_optimizer(model, config.optimizer)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    result = accumulate_gradients(model, [batch(), batch()], torch.float32, step=0)
    apply_gradients(model, optimizer, result, clip=1.0, step=0)
    still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    first_router = [name for name in still if name.endswith("previous")][:1]  # nothing lies below the first layer
    assert still == [name for name in before if name in {*frozen, *first_router}]
    assert 3 < result.losses["lm"] < 7


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_counted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--json"]) == 0
    size = json.loads(capsys.readouterr().out)
    assert 0 < size["active_params"] <= size["total_params"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_comparison_and_a_full_note(name: str) -> None:
    if name == "dense":
        return  # it is what the others are compared with
    ours, other = arms(name).values()
    note = ours.recipe
    assert note is not None
    assert any(command in note.check for command in (f"moeforge reproduce {name}", "moeforge train", "moeforge demo"))
    assert note.arxiv and note.title and note.claim.endswith(".")
    assert ours.steps * ours.tokens_per_step == other.steps * other.tokens_per_step
    assert ours.model != other.model or ours.accumulate != other.accumulate


@pytest.mark.parametrize("name", ["multi-head-parity", "product-key-memory", "million-experts", "sparse-memory"])
def test_recipes_that_say_so_cost_what_their_comparison_costs(name: str) -> None:
    ours, other = (measure(config.model.replace(vocab_size=VOCAB), seq_len=256) for config in arms(name).values())
    assert ours.flops_per_token == pytest.approx(other.flops_per_token, rel=0.01)
    assert name != "multi-head-parity" or ours.total.all == pytest.approx(other.total.all, rel=0.01)
