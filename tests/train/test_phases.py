"""Weights that take turns: what is held does not move by a bit, and a resumed run is still the same run."""

import pytest
import torch

from moeforge.data.prepare import prepare
from moeforge.errors import UserError
from moeforge.train import Run
from moeforge.train.phases import Phase, phase_at

ROUTER = "*.router.gate.weight"
IN_TURN = [{"steps": 2, "trains": [ROUTER]}, {"steps": 1, "holds": ["*.router.*", "embedding.*"]}]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


def still(before: dict[str, torch.Tensor], run: Run) -> set[str]:
    return {name for name, weight in run.model.named_parameters() if torch.equal(weight, before[name])}


def test_each_phase_moves_its_own_weights_and_no_other(tiny, tmp_path):
    config = tiny(phases=IN_TURN, steps=9, optimizer={"weight_decay": 0.5})
    run = Run(config, tmp_path, prepare(config.data, config.tokenizer))
    names = set(weights(run))
    routers, table = {name for name in names if ".router." in name}, {"embedding.weight"}
    for step in range(6):
        before = weights(run)
        run.step()
        assert still(before, run) == (names - routers if step % 3 < 2 else routers | table), step


def test_moments_of_what_is_held_do_not_age(tiny, tmp_path):
    config = tiny(phases=IN_TURN, steps=9)
    run = Run(config, tmp_path, prepare(config.data, config.tokenizer))
    for _ in range(4):
        run.step()
    done = {name: run.optimizer.state[weight].get("step", 0) for name, weight in run.model.named_parameters()}
    assert done["blocks.1.moe.router.gate.weight"] == 3 and done["norm.weight"] == 1 and done["embedding.weight"] == 0


def test_without_phases_nothing_changes_and_one_phase_of_everything_is_none(tiny, tmp_path):
    runs = []
    for phases in ([], [{"steps": 2}]):
        config = tiny(phases=phases)
        run = Run(config, tmp_path, prepare(config.data, config.tokenizer))
        run.step(), run.step()
        runs.append(weights(run))
    assert all(torch.equal(runs[0][name], weight) for name, weight in runs[1].items())


def test_a_resumed_run_is_in_the_phase_it_would_be_in(tiny, tmp_path):
    config = tiny(phases=IN_TURN, steps=5)
    text = prepare(config.data, config.tokenizer)
    whole, cut, resumed = (Run(config, tmp_path, text) for _ in range(3))
    whole_steps = [whole.step()["loss/lm"] for _ in range(5)]
    cut.step(), cut.checkpoint()
    resumed.resume()
    assert [resumed.step()["loss/lm"] for _ in range(4)] == whole_steps[1:]
    assert not {*weights(whole)} - still(weights(whole), resumed)


def test_phases_follow_one_another_in_a_circle():
    phases = [Phase.model_validate(phase) for phase in IN_TURN]
    assert [phases.index(phase_at(phases, step)) for step in range(7)] == [0, 0, 1, 0, 0, 1, 0]
    assert phase_at([], 3) is None


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"steps": 1, "trains": ["*.routers.*"]}, "'\\*.routers.\\*' names no weight that can move"),
        ({"steps": 1, "trains": [ROUTER], "holds": ["*.router.*"]}, "nothing moves"),
    ],
)
def test_phases_that_do_nothing_are_refused(tiny, tmp_path, phase, message):
    config = tiny(phases=[phase])
    with pytest.raises(UserError, match=message):
        Run(config, tmp_path, prepare(config.data, config.tokenizer))
