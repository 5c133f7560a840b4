"""lm-evaluation-harness as a client: what it measures over HTTP is what it measures in the process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'moeforge[eval]'")
pytest.importorskip("transformers", reason="the client's tokenizer: pip install 'moeforge[hf]'")
pytest.importorskip("tenacity", reason="the harness's client over HTTP: pip install 'lm-eval[api]'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI

from moeforge.evaluate.harness import Harness, open_tasks, run
from moeforge.hub import load
from tests.evaluate.test_harness import ROWS, TEXTS, task
from tests.serve.conftest import Served

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
Client = Callable[..., LocalCompletionsAPI]


@pytest.fixture
def client(server: Served, folder: Path) -> Client:
    """``client(num_concurrent=4)``: the harness's own, with the tokenizer out of the folder."""

    def make(**options: Any) -> LocalCompletionsAPI:
        where = {"base_url": f"{server.url}/v1/completions", "model": folder.name, "tokenizer": str(folder)}
        return LocalCompletionsAPI(**where, tokenizer_backend="huggingface", max_length=256, **options)

    return make


@pytest.fixture(scope="module")
def inside(folder: Path) -> Harness:
    """The same model without a server."""
    return Harness(*load(folder))


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=str)
def test_log_likelihoods(client: Client, inside: Harness, options: dict[str, int]) -> None:
    pairs = [(context, answer) for context in TEXTS for answer in (" yes", "n", " a longer answer")]
    over_http = client(**options).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    here = inside.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in over_http] == pytest.approx([score for score, _ in here], abs=1e-4)
    assert [greedy for _, greedy in over_http] == [greedy for _, greedy in here]
    assert len({round(score, 3) for score, _ in here}) > len(pairs) // 2, "numbers that hardly differ prove nothing"


def test_an_answer_that_greedy_text_would_give_is_told(client: Client, inside: Harness) -> None:
    contexts = [f"{text} {letter}" for text in TEXTS for letter in "abcdef"]
    best = [int(inside.model(torch.tensor([inside.tok_encode(text)])).logits[0, -1].argmax()) for text in contexts]
    pairs = [(text, chr(token)) for text, token in zip(contexts, best, strict=True) if 32 < token < 127]
    assert pairs, "no context goes on with a letter"
    assert all(greedy for _, greedy in client().loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True))


def test_greedy_text_up_to_a_stop_string(client: Client, inside: Harness) -> None:
    free = {"until": [], "max_gen_toks": 24}
    (whole,) = inside.generate_until(asked("generate_until", (TEXTS[0], dict(free))), True)
    for until in ([], [whole[5:7]]):
        how = {"until": until, "max_gen_toks": 24}
        here = inside.generate_until(asked("generate_until", *((text, dict(how)) for text in TEXTS)), True)
        over_http = client().generate_until(asked("generate_until", *((text, dict(how)) for text in TEXTS)), True)
        assert over_http == here


def test_the_score_of_a_task(client: Client, folder: Path, tmp_path: Path) -> None:
    file = str(task(tmp_path, ROWS))
    here = run(*load(folder), [file], 4, None).results["tiny"]
    found: Any = evaluate(client(), open_tasks([file]), bootstrap_iters=0, log_samples=False)
    assert found["results"]["tiny"]["acc,none"] == here["acc,none"] in [right / len(ROWS) for right in range(1, 12)]


def test_whole_texts_and_answers_without_a_context(client: Client, inside: Harness) -> None:
    """Here the end token stands before the text; what is echoed must count it."""
    whole, bare = asked("loglikelihood_rolling", *((text,) for text in TEXTS)), [("", text) for text in TEXTS]
    here = inside.loglikelihood_rolling(whole, disable_tqdm=True)
    assert client().loglikelihood_rolling(whole, disable_tqdm=True) == pytest.approx(here, abs=1e-3)
    over_http, here = (
        one.loglikelihood(asked("loglikelihood", *bare), disable_tqdm=True) for one in (client(), inside)
    )
    assert [score for score, _ in over_http] == pytest.approx([score for score, _ in here], abs=1e-4)
