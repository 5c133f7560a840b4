"""A teacher's part of the loss against its equation, when it stops, and that a run with one resumes bit for bit."""

from pathlib import Path

import pytest
import torch

from moeforge.config import build, read_yaml
from moeforge.data.prepare import prepare
from moeforge.errors import UserError
from moeforge.evaluate import summed_loss
from moeforge.hub import load
from moeforge.train import Run, RunConfig, train
from moeforge.train.checkpoint import checkpoints
from moeforge.train.metrics import read_metrics
from moeforge.train.step import accumulate_gradients


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(tiny(seed=7), out, quiet=True)
    return str(out)


def student(tiny, teacher: str, steps: int = 6, **distill: object) -> RunConfig:
    """A shallower model with the same experts."""
    shallow = {"num_layers": 1, "first_dense_layers": 0, "moe": {"router": {"losses": []}}}
    return tiny(model=shallow, steps=steps, distill={"teacher": teacher, **distill})


@pytest.mark.parametrize("settings", [{}, {"weight": 0.3, "temperature": 2.0}])
def test_the_loss_is_its_equation(tiny, tmp_path: Path, teacher: str, settings: dict[str, float]) -> None:
    config = student(tiny, teacher, **settings)
    run = Run(config, tmp_path, prepare(config.data, config.tokenizer))
    batches = [next(run.loader) for _ in range(2)]
    batches[0].labels[0, :9] = -100
    result = accumulate_gradients(run.model, batches, torch.float32, 0, teacher=run.teacher)
    found = {name: weight.grad.clone() for name, weight in run.model.named_parameters() if weight.grad is not None}
    run.model.zero_grad()
    weight, temperature = settings.get("weight", 1.0), settings.get("temperature", 1.0)
    theirs, total, divergence = load(Path(teacher))[0], 0.0, 0.0
    targets = sum(int((batch.labels != -100).sum()) for batch in batches)
    for batch in batches:
        place = {"position": batch.position, "document": batch.document}
        output = run.model(batch.input_ids, **place)
        with torch.no_grad():
            wanted = (theirs(batch.input_ids, **place).logits / temperature).softmax(-1)
        logs = (output.logits / temperature).log_softmax(-1)
        each = (wanted * (wanted.log() - logs)).sum(-1)[batch.labels != -100].sum() * temperature**2 / targets
        loss = summed_loss(output, batch.labels) / targets + weight * each
        loss.backward()
        divergence, total = divergence + each.item(), total + loss.item()
    assert result.losses["distill"] == pytest.approx(divergence, rel=1e-5) and divergence > 0.001
    assert result.losses["lm"] + weight * divergence == pytest.approx(total, rel=1e-5)
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_who_teaches_itself_learns_nothing_new(tiny, tmp_path: Path, teacher: str) -> None:
    config = tiny(distill={"teacher": teacher}, start_from=teacher)
    run = Run(config, tmp_path, prepare(config.data, config.tokenizer), fresh=True)
    run.model.eval()
    result = accumulate_gradients(run.model, [next(run.loader)], torch.float32, 0, teacher=run.teacher)
    assert abs(result.losses["distill"]) < 1e-6


def test_the_teacher_stops_where_it_should(tiny, tmp_path: Path, teacher: str) -> None:
    train(student(tiny, teacher, until=0.5), tmp_path / "staged", quiet=True)
    lines = read_metrics(tmp_path / "staged" / "metrics.jsonl")
    assert ["loss/distill" in line for line in lines] == [True] * 3 + [False] * 3
    train(student(tiny, teacher), tmp_path / "full", quiet=True)
    assert all("loss/distill" in line for line in read_metrics(tmp_path / "full" / "metrics.jsonl"))
    kept = build(RunConfig, read_yaml(tmp_path / "staged" / "config.yaml")).distill
    assert kept is not None and kept.until == 0.5


def test_a_run_with_a_teacher_resumes_bit_for_bit(tiny, tmp_path: Path, teacher: str) -> None:
    config = student(tiny, teacher, until=0.7)
    train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "cut", quiet=True)
    newest = checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    for path in [*newest.iterdir()]:
        path.unlink()
    newest.rmdir()
    train(config, tmp_path / "cut", resume=True, quiet=True)
    whole, cut = (load(tmp_path / name)[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())


def test_without_a_teacher_nothing_changes(tiny, tmp_path: Path, teacher: str) -> None:
    config = tiny()
    plain = Run(config, tmp_path, prepare(config.data, config.tokenizer))
    assert plain.teacher is None and "loss/distill" not in plain.step()


def test_bad_teachers_are_refused(tiny, tmp_path: Path, teacher: str) -> None:
    def run(config: RunConfig) -> None:
        Run(config, tmp_path, prepare(config.data, config.tokenizer))

    with pytest.raises(UserError, match="nowhere"):
        run(student(tiny, str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"distill.teacher: .* has another tokenizer: name it with --tokenizer.path"):
        run(tiny(distill={"teacher": teacher}, tokenizer={"type": "bpe", "vocab_size": 257}))
    with pytest.raises(UserError, match=r"reads at most \d+ tokens, seq_len is 4096"):
        run(tiny(distill={"teacher": teacher}, seq_len=4096, model={"max_seq_len": 4096}, eval_tokens=8192))
    with pytest.raises(UserError, match=r"distill.until = 0.01 of 6 steps is none of them"):
        tiny(distill={"teacher": teacher, "until": 0.01})
