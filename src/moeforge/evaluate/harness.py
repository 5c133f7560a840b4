"""A decoder under lm-evaluation-harness: the tasks of that project, and any jsonl that a short YAML file describes.

Its interface asks for log-likelihoods of texts and for greedy text; the numbers are those of its own adapter for
transformers on the same model. Import this module only where ``lm_eval`` is installed.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, get_session
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from moeforge.config import Tree, nearest
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.models import Cache, Decoder
from moeforge.models.domain import known

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names by which a task says how much to write at most, the first one counts."""
WRITES_AT_MOST = 256
"""Tokens, where a task says nothing."""
REACHED_WITHIN = 5.0
"""Seconds in which the hub answers, or is taken to be out of reach."""


class Scored(NamedTuple):
    """What tasks found."""

    results: dict[str, dict[str, Any]]
    """By task, its metrics under the harness's own names (``acc,none``), and of each its standard error."""
    truncated: int
    """Requests of which the model's context took only the end."""


def run(model: Decoder, tokenizer: Tokenizer, tasks: Sequence[str], batch_size: int, limit: int | None) -> Scored:
    """Runs ``tasks``, names or YAML files, on ``limit`` documents each at most.

    Raises UserError for a task that does not exist or cannot be built, for a model whose routers compare tokens, and
    for one that routes by domain.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task leaves alone
    harness = Harness(model, tokenizer, batch_size)
    opened = open_tasks(tasks)
    with redirect_stdout(sys.stderr):  # it prints what it is at; results alone belong to the output
        found: Any = evaluate(harness, opened, limit=limit, bootstrap_iters=1000, log_samples=False)
    return Scored(found["results"], harness.truncated)


def open_tasks(names: Sequence[str]) -> Any:
    """The tasks with their documents, as the harness's own manager gives them. Raises UserError, naming the task."""
    files = {name for name in names if Path(name).suffix in (".yaml", ".yml") or Path(name).exists()}
    manager = TaskManager(include_defaults=not files.issuperset(names))  # the index of its own tasks takes its time
    for name in names:
        if name not in files and name not in manager.all_tasks:
            raise UserError(f"there is no task '{name}'.{nearest(name, manager.all_tasks)} A YAML file names one, too")
    configs = [_read(Path(name)) if name in files else name for name in names]
    opened: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, config in zip(names, configs, strict=True):
        try:
            with _no_waiting_for_the_hub(config):
                loaded: Any = manager.load([config])
                _try_first_document(loaded["tasks"])
        except Exception as error:  # tasks are templates and code of theirs, and anything may be wrong in them
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "" if name in files else ". It downloads its data; a YAML file over a jsonl file works offline"
            raise UserError(f"task {name} cannot be built ({reason}){hint}") from error
        for part, found in opened.items():
            found.update(loaded[part])
    return opened


@contextmanager
def _no_waiting_for_the_hub(config: str | Tree) -> Iterator[None]:
    """Where a task's data is on a hub that cannot be reached, the hub's library is in its offline mode meanwhile.

    What is kept on disk is taken, then, and nothing asked for again and again for a minute first.
    """
    before = constants.HF_HUB_OFFLINE
    if isinstance(config, str) or "data_files" not in (config.get("dataset_kwargs") or {}):
        try:
            get_session().head(constants.ENDPOINT, timeout=REACHED_WITHIN)
        except Exception:  # those of whichever client it has
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _read(file: Path) -> Tree:
    """A task's YAML; paths of data in it are relative to the file."""
    try:
        tree = load_yaml(file)
    except Exception as error:
        raise UserError(f"{file} is no task: {' '.join(str(error).split())}") from error
    if "task" not in tree:
        raise UserError(f"{file} is no task: it has no 'task', its name")
    options = tree.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        tree["dataset_kwargs"] = {**options, "data_files": _beside(file, options["data_files"])}
    return tree


def _beside(file: Path, data: Any) -> Any:
    if isinstance(data, dict):
        return {split: _beside(file, paths) for split, paths in data.items()}
    if isinstance(data, list):
        return [_beside(file, path) for path in data]
    path = file.parent / str(data)
    if "://" not in str(data) and not any(sign in str(data) for sign in "*?[") and not path.exists():
        raise UserError(f"{file}: data_files names {path}, which does not exist")
    return str(path) if "://" not in str(data) else data


def _try_first_document(tasks: dict[str, Any]) -> None:
    """Raises what the task raises where its templates do not fit its documents, and for a metric that nobody has."""
    for task in tasks.values():
        unknown = [name for name, function in task._metric_fn_list.items() if function is None]
        if unknown and task.config.process_results is None:
            raise ValueError(f"there is no metric '{unknown[0]}'")
        document = next(iter(task.eval_docs))
        task.doc_to_text(document), task.doc_to_target(document)
        if task.OUTPUT_TYPE == "multiple_choice":
            task.doc_to_choice(document)


class Harness(TemplateLM):
    """What lm-evaluation-harness calls a model, over a ``Decoder`` and its tokenizer."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        """Raises UserError for a model that reads a text otherwise than token by token, or not without its domain."""
        super().__init__()
        comparing = [name for name, router in model.routers.items() if not router.config.decodes]
        if comparing:
            raise UserError(
                f"in {', '.join(comparing)} a token's experts depend on later tokens too, so there is no likelihood of "
                "a continuation; moeforge evaluate without --tasks scores whole texts"
            )
        known(model, None, torch.empty(0))
        self.model, self.reader, self.batch_size, self.truncated = model.eval(), tokenizer, batch_size, 0
        self.max_length = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self.reader.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has nothing before it: what the tokenizer itself puts there, or the end token."""
        return (*self.reader.inner.encode("").ids, self.reader.eos_id)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with what the tokenizer puts around a text unless told not to."""
        return self.reader.inner.encode(string, add_special_tokens=add_special_tokens is not False).ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows of the context's length, every token predicted once."""
        windows: list[tuple[int, Any, list[int], list[int]]] = []
        for index, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            windows += [(index, None, *make_disjoint_window(pair)) for pair in cut]
        scores = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (index, *_), (score, _) in zip(windows, scores, strict=True):
            totals[index] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(summed log-probability, whether greedy text would be the same) of each continuation; longest rows first."""
        rows = [(context, continuation) for _, context, continuation in requests]
        longest = max((len(continuation) for _, continuation in rows), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation has {longest} tokens, the model's context takes {self.max_length}")
        self.truncated += sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in rows)
        order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                for index, score in zip(some, self._score([rows[index] for index in some]), strict=True):
                    found[index] = score
                bar.update(len(some))
        return found

    @torch.no_grad()
    def _score(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """A batch. Rows are filled up on the right, where a causal model does not look."""
        inputs = [torch.tensor((context + answer)[-(self.max_length + 1) :][:-1]) for context, answer in rows]
        ids_BL = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=self.eot_token_id)
        logits_BLV = self._run(ids_BL).cpu()
        for row, (_, answer), logits_LV in zip(inputs, rows, logits_BLV, strict=True):
            logits_NV = logits_LV[len(row) - len(answer) : len(row)].float()
            targets_N = torch.tensor(answer)
            chosen_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])
            yield float(chosen_N.sum()), bool((logits_NV.argmax(-1) == targets_N).all())

    def _run(self, ids_BL: Tensor, cache: Cache | None = None) -> Tensor:
        ids_BL = ids_BL.to(self.model.embedding.weight.device)
        return self.model(ids_BL, cache=cache, known=known(self.model, None, ids_BL)).logits

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to one of the strings in ``until``, the document's end, or the most tokens asked for."""
        asked = [request.args for request in requests]
        return [self._write(text, dict(how)) for text, how in tqdm(asked, disable=disable_tqdm, desc="texts")]

    def _write(self, text: str, how: dict[str, Any]) -> str:
        limits = [how.pop(name, None) for name in LIMITS]
        most = next((limit for limit in limits if limit is not None), WRITES_AT_MOST)
        until = how.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        if how.pop("do_sample", False) or how.pop("temperature", 0) or how:
            raise UserError(
                f"generation_kwargs: only greedy text is written here, until {LIMITS[0]}; not {how or 'so'}"
            )
        if most >= self.max_length:
            raise UserError(f"{LIMITS[0]} = {most} leaves no room in the model's context of {self.max_length}")
        prompt = self.tok_encode(text) or [self.prefix_token_id]
        self.truncated += len(prompt) > self.max_length - most
        written = self._greedy(prompt[most - self.max_length :], most, stops)
        return written[: min((place for stop in stops if (place := written.find(stop)) >= 0), default=len(written))]

    @torch.no_grad()
    def _greedy(self, prompt: list[int], most: int, stops: list[str]) -> str:
        cache, ids, found = Cache(self.model, 1, len(prompt) + most), prompt, list[int]()
        while len(found) < most:
            token = int(self._run(torch.tensor([ids]), cache)[0, -1, : self.reader.vocab_size].argmax())
            if token in self.reader.end_ids:
                break
            found, ids = [*found, token], [token]
            if any(stop in self.reader.decode(found) for stop in stops):
                break
        return self.reader.decode(found)
