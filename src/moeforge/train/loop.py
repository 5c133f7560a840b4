"""The training loop: data in, steps, evaluation, checkpoints, and a model folder at the end."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from moeforge.config import build, to_yaml
from moeforge.data.packing import Loader, evaluation_batches
from moeforge.data.prepare import TextData, prepare
from moeforge.errors import UserError
from moeforge.evaluate import Score, bits_per_byte
from moeforge.hub import save
from moeforge.hub.whole import write_text
from moeforge.kernels.allocator import keep_freed_memory
from moeforge.models import Decoder, ModelConfig
from moeforge.parallel.ranks import ALONE, Ranks
from moeforge.train.background import Background
from moeforge.train.checkpoint import (
    Progress,
    checkpoints,
    clear_unfinished,
    load_checkpoint,
    save_checkpoint,
    weights,
)
from moeforge.train.config import RunConfig
from moeforge.train.distill import Teacher
from moeforge.train.metrics import Line, Metrics, step_line
from moeforge.train.optimizer import build_optimizer, learning_rate
from moeforge.train.phases import check_phases, hold, phase_at
from moeforge.train.progress import Display
from moeforge.train.start import start_from
from moeforge.train.step import accumulate_gradients, apply_gradients


class Run:
    """One training run in its folder. Equal config and software give equal weights, also across a resume."""

    def __init__(self, config: RunConfig, out: Path, data: TextData, ranks: Ranks = ALONE, fresh: bool = False) -> None:
        """``fresh``: takes the weights of ``config.start_from``, where there is one."""
        torch.manual_seed(config.seed)
        self.out, self.data, self.ranks = out, data, ranks
        self.device = choose_device(config.device)
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.config = _with_data(config, data)
        self.model = Decoder(self.config.model).to(self.device)
        check_phases(config.phases, self.model)
        self.model.recompute_activations = config.recompute_activations
        if fresh and config.start_from:
            start_from(Path(config.start_from), self.model, data.tokenizer)
        taught = config.distill
        self.teacher = Teacher(taught, data.tokenizer, config.seq_len, self.device) if taught else None
        ranks.place(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loader = Loader(data.train, config.batch_size, config.seq_len, config.seed)
        self.progress = Progress()
        self.saving = Background() if config.save_in_background else None
        self.writers = ranks.for_a_thread() if self.saving else ranks

    def resume(self) -> None:
        """Takes up the newest checkpoint. Raises UserError when it is damaged or does not fit."""
        found = checkpoints(self.out / "checkpoints")
        self.progress, position = load_checkpoint(found[-1], self.model, self.optimizer, self.config, self.ranks)
        if position.pop("fingerprint") != self._fingerprint:
            raise UserError(f"{found[-1]} was trained on other text than {self.config.data.type} gives now")
        self.loader.load_state(position)

    def step(self) -> Line:
        """One optimizer step; returns its metrics."""
        start, config, done, ranks = time.perf_counter(), self.config, self.progress.step, self.ranks
        ranks.begin(config.seed, done)
        lr = learning_rate(config.schedule, config.optimizer.lr, done, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [next(self.loader).to(self.device) for _ in range(config.accumulate)]
        teacher = self.teacher if config.distill and config.distill.acts(done, config.steps) else None
        result = accumulate_gradients(self.model, batches, self.dtype, done, ranks, teacher)
        hold(self.model, phase_at(config.phases, done))
        apply_gradients(self.model, self.optimizer, result, config.optimizer.clip, done, ranks)
        ranks.settle(done + 1, result.tokens_per_expert, self.optimizer)
        seconds = time.perf_counter() - start
        self.progress.step += 1
        self.progress.tokens += config.tokens_per_step
        self.progress.seconds += seconds
        line = step_line(self.progress.step, result, lr, seconds, config.tokens_per_step)
        return line | {f"sent/{kind}": count for kind, count in ranks.sent().items()}

    def evaluate(self) -> Score:
        """Bits per byte on ``eval_tokens`` of the validation text."""
        config = self.config
        batches = evaluation_batches(self.data.validation, config.batch_size, config.seq_len, config.eval_tokens)
        own = bits_per_byte(self.model, map(self.ranks.own, batches), self.dtype, self.device)
        nats, targets = self.ranks.total(torch.tensor([own.nats, own.num_targets], dtype=torch.float64)).tolist()
        return Score(nats, own.num_bytes, int(targets))

    @property
    def _fingerprint(self) -> str:
        """Of all that the model gets to see of the text."""
        text = self.data.train
        return text.fingerprint + (text.domain_fingerprint if self.config.model.looks_up_domains else "")

    def checkpoint(self) -> Path:
        """Saves where the run stands; with ``save_in_background``, begins to."""
        position = {**self.loader.state(), "fingerprint": self._fingerprint}
        folder = self.out / "checkpoints"
        what = self.model, self.optimizer, self.progress, position, self.config
        return save_checkpoint(folder, *what, self.writers, saving=self.saving)


def train(
    config: RunConfig,
    out: Path,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[Line], None] | None = None,
    data: TextData | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Trains ``config`` into the run folder ``out`` and returns its ``model`` folder.

    ``data`` is what ``prepare`` makes of the config, for a caller that has it already. Of several ``ranks``, each calls
    this; the first alone says and writes something, but for checkpoints, in which each writes its part.
    Raises UserError on bad input, a non-finite loss, or a full disk; KeyboardInterrupt after saving a checkpoint.
    """
    resume = _goes_on(out, resume)
    keep_freed_memory()
    with Display(config.name, config.steps, 0, quiet or not ranks.first) as display:
        display.say(f"reading {config.data.type} ...")
        run = Run(config, out, data or _prepared(config, ranks), ranks, fresh=not resume)
        if ranks.first:
            clear_unfinished(out / "checkpoints")
        if resume:
            run.resume()
            display.say(f"resumed at step {run.progress.step}")
        elif config.start_from:
            display.say(f"starting with the weights of {config.start_from}")
        _announce(run, display)
        if ranks.first:
            write_text(out / "config.yaml", to_yaml(run.config))
        with (
            Metrics(out, run.progress.step, config.tensorboard) if ranks.first else nullcontext() as metrics,
            run.saving or nullcontext(),
        ):
            _steps(run, metrics, display, on_step)
    model = _in_one_place(run)
    if model is not None:
        save(model, run.data.tokenizer, out / "model")
    return out / "model"


def _goes_on(out: Path, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from. A run that was stopped before its first one begins anew either way.

    Raises UserError for a run that would be lost, or one to go on with that never was.
    """
    saved = bool(checkpoints(out / "checkpoints"))
    if not resume and (saved or (out / "model").exists()):
        raise UserError(f"{out} already holds a run: add --resume to go on with it, or name another folder with --out")
    if resume and not saved and not (out / "config.yaml").exists():
        raise UserError(f"{out} has no checkpoint to resume from")
    return saved


def _prepared(config: RunConfig, ranks: Ranks) -> TextData:
    """The first process goes ahead: the others find in the cache what it made."""
    if ranks.first:
        data = prepare(config.data, config.tokenizer)
        ranks.gather(None)
        return data
    ranks.gather(None)
    return prepare(config.data, config.tokenizer)


def _in_one_place(run: Run) -> Decoder | None:
    """The model with all of its weights; None on all processes but the first."""
    if run.ranks.size == 1:
        return run.model
    from moeforge.parallel.store import gathered

    tensors = gathered(weights(run.model, run.ranks), keep=run.ranks.first)
    if not run.ranks.first:
        return None
    with torch.device("meta"):
        model = Decoder(run.config.model)
    model.load_state_dict(tensors, assign=True)
    return model


def _steps(run: Run, metrics: Metrics | None, display: Display, on_step: Callable[[Line], None] | None) -> None:
    config, steps = run.config, run.config.steps
    with _interruptible() as interrupted:
        while run.progress.step < steps:
            line = run.step()
            done = run.progress.step
            if done % config.eval_every == 0 or done == steps:
                line["eval/bits_per_byte"] = run.evaluate().bits_per_byte
            line["perf/total_seconds"], line["perf/total_tokens"] = run.progress.seconds, run.progress.tokens
            if metrics is not None:
                metrics.write(line)
            display.update(line)
            if on_step:
                on_step(line)
            stop = run.ranks.any(bool(interrupted))
            saved = run.checkpoint() if done % config.save_every == 0 or done == steps or stop else None
            if stop and done < steps:
                if run.saving:
                    run.saving.wait()
                display.say(f"\nstopped; {saved} is saved. Go on with:\n  {resume_command(run.out)}")
                raise KeyboardInterrupt


def resume_command(out: Path) -> str:
    """What to type to go on with the run in ``out``."""
    return f"moeforge train {out / 'config.yaml'} --out {out} --resume"


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The list fills at the first Ctrl-C (or SIGTERM), so that the step can end; the second one acts at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may listen to signals
        return
    before = {int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(run: Run, display: Display) -> None:
    """Says what is on: sizes, data, and every loss that acts, with its weight."""
    parameters = sum(run.ranks.whole(name, p).numel() for name, p in run.ranks.parameters(run.model).items())
    display.say(
        f"{run.config.name}: {parameters:,} parameters, {len(run.data.train.ids):,} training tokens, "
        f"{len(run.data.validation.ids):,} for validation, {run.config.tokens_per_step:,} per step, on {run.device}"
        + (f", {run.ranks.size} processes" if run.ranks.size > 1 else "")
    )
    if (distill := run.config.distill) is not None:
        last = round(distill.until * run.config.steps)
        display.say(f"learning from {distill.teacher} too, up to step {last:,}, with weight {distill.weight:g}")
    routers = [router.config for router in run.model.routers.values()]
    losses = {f"{loss.type} x {loss.weight:g}" for router in routers for loss in router.losses}
    biases = {router.controller.type for router in routers if router.controller}
    if routers:
        display.say(f"balance: {', '.join(sorted(losses | biases)) or 'nothing is on'}")


def _with_data(config: RunConfig, data: TextData) -> RunConfig:
    """The config with what the model must know of its text. Raises UserError when the two do not fit."""
    model, size = config.model, data.tokenizer.vocab_size
    if model.vocab_size not in (None, size):
        raise UserError(f"model.vocab_size = {model.vocab_size}, but the tokenizer has {size}: leave it out")
    learned = {**model.model_dump(), "vocab_size": size}
    if model.looks_up_domains:
        if len(data.domains) < 2:
            raise UserError(
                f"a gate looks up domains, but all text of {config.data.type} is of one: see data.domain_field"
            )
        if model.domains not in ((), data.domains):
            raise UserError(
                f"model.domains = {list(model.domains)}, but the data has {list(data.domains)}: leave it out"
            )
        learned["domains"] = data.domains
    return config.replace(model=build(ModelConfig, learned, source="the model with this data"))


def choose_device(wanted: str) -> torch.device:
    """Where ``device: auto | cpu | cuda`` runs. Raises UserError when it asks for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda, but this torch sees no GPU: use device=cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
