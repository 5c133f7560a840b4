"""Runs whose gates look up the domain of a text: data, checkpoints, the model folder, and what does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeforge.config import merge
from moeforge.data.packing import evaluation_batches
from moeforge.data.prepare import prepare
from moeforge.errors import UserError
from moeforge.evaluate import bits_per_byte
from moeforge.hub import load
from moeforge.train import Run, train

GATE = {"type": "lookup", "by": "domain", "num_ids": 2}
MODEL = {"model": {"moe": {"router": {"gate": GATE, "score": "softmax", "controller": None}}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains whose texts have no letter in common."""
    root = tmp_path_factory.mktemp("domains")
    for domain, text in (("low", "abcd "), ("up", "WXYZ\n")):
        (root / domain).mkdir()
        for number in range(30):
            (root / domain / f"{number}.txt").write_text(text * 20)
    return root


@pytest.fixture(scope="module")
def config(tiny, folders: Path):
    return tiny(**merge({"data": {"path": str(folders), "validation_fraction": 0.3}, "steps": 6}, MODEL))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config, out, quiet=True)
    return out


def test_the_model_folder_knows_the_names_and_every_row_of_the_table_learned(finished: Path, config) -> None:
    model, _ = load(finished)
    assert model.config.domains == ("low", "up")
    fresh = Run(config, finished.parent / "other", prepare(config.data, config.tokenizer)).model
    moved = [(a != b).any(-1) for a, b in zip(tables(model), tables(fresh), strict=True)]
    assert moved and all(bool(rows.all()) for rows in moved)


def tables(model) -> list[torch.Tensor]:
    return [moe.router.gate.table for moe in model.moe_layers.values()]


def test_all_tokens_of_a_domain_go_to_the_same_experts(finished: Path, config) -> None:
    model, tokenizer = load(finished)
    (batch, *_) = evaluation_batches(prepare(config.data, tokenizer).validation, 40, 32)
    for routing in model(
        batch.input_ids, position=batch.position, document=batch.document, known=batch.known
    ).routings.values():
        taken = routing.route.expert[routing.route.slot.argsort()].view(-1, 2)
        for domain in (0, 1):
            assert len(taken[batch.domain.flatten() == domain].unique(dim=0)) == 1


def test_the_wrong_domain_is_another_model(finished: Path, config) -> None:
    model, tokenizer = load(finished)
    text = prepare(config.data, tokenizer).validation
    with torch.no_grad():
        for moe in model.moe_layers.values():
            moe.router.gate.table.copy_(torch.tensor([[9.0, 5.0, 0, 0], [0, 0, 9.0, 5.0]]))
    (batch, *_) = evaluation_batches(text, 8, 32)
    right = model(batch.input_ids, position=batch.position, document=batch.document, known=batch.known).logits
    wrong = model(
        batch.input_ids, position=batch.position, document=batch.document, known={"domain": 1 - batch.domain}
    ).logits
    assert not torch.allclose(right, wrong, atol=1e-3)
    assert bits_per_byte(model, evaluation_batches(text, 8, 32)).num_bytes > 0


def test_a_run_by_domain_resumes_bit_for_bit(config, tmp_path: Path) -> None:
    data = prepare(config.data, config.tokenizer)
    straight, stopped = Run(config, tmp_path / "a", data), Run(config, tmp_path / "b", data)
    for _ in range(3):
        straight.step(), stopped.step()
    stopped.checkpoint()
    resumed = Run(config, tmp_path / "b", prepare(config.data, config.tokenizer))
    resumed.resume()
    for _ in range(3):
        straight.step(), resumed.step()
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    relabelled = replace(data, train=replace(data.train, domain=1 - data.train.domain))
    with pytest.raises(UserError, match="was trained on other text"):
        Run(config, tmp_path / "b", relabelled).resume()


def test_text_that_does_not_fit_the_gates_is_refused(config, tiny, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all text of files is of one"):
        train(tiny(**MODEL), tmp_path / "one", quiet=True)
    one = {"model": {"moe": {"router": {"gate": {"num_ids": 1}}}}}
    few = tiny(**merge(merge({"data": config.data.model_dump()}, MODEL), one))
    with pytest.raises(UserError, match="num_ids = 1 is less than 2 domains"):
        train(few, tmp_path / "few", quiet=True)
    named = config.replace(model=config.model.replace(domains=("low", "high")))
    with pytest.raises(UserError, match=r"model.domains = \['low', 'high'\], but the data has \['low', 'up'\]"):
        train(named, tmp_path / "named", quiet=True)
