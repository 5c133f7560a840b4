"""Our adapter for lm-evaluation-harness: the numbers of its own adapter for transformers, and tasks out of files."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'moeforge[eval]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'moeforge[hf]'")

from lm_eval.api.instance import Instance  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from moeforge.data.tokenizers import Tokenizer  # noqa: E402
from moeforge.errors import UserError  # noqa: E402
from moeforge.evaluate.harness import Harness, open_tasks, run  # noqa: E402
from moeforge.hub import load  # noqa: E402
from tests.hub import own  # noqa: E402

TEXTS = ["the quick brown fox", "a", "über den Wolken  ", "x" * 100, "two lines\nof text\n"]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=["ours", "a family"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "m"
    return own.write(folder) if request.param == "ours" else family(folder)


def family(folder: Path) -> Path:
    """A public family's folder, with a tokenizer that puts a token before every text."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "eos_token_id": 256}
    torch.manual_seed(1)
    config = transformers.MixtralConfig(**sizes, **heads, initializer_range=0.3, max_position_embeddings=64)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer = own.tokenizer()
    tokenizer.inner.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> Harness:
    return Harness(*load(folder), batch_size=3)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=64)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_adapter_for_transformers(ours, theirs):
    pairs = [(context, answer) for context in ["", *TEXTS] for answer in (" yes", "n", " a longer answer")]
    asked = requests("loglikelihood", *pairs)
    got, want = (harness.loglikelihood(asked, disable_tqdm=True) for harness in (ours, theirs))
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert len({round(score, 3) for score, _ in got}) > len(pairs) // 2, "numbers that hardly differ prove nothing"


def test_a_greedy_answer_is_told(ours):
    context = ours.tok_encode("the")
    best = int(ours.model(torch.tensor([context])).logits[0, -1].argmax())
    answers = [(None, context, [best]), (None, context, [(best + 1) % 257])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(answers, disable_tqdm=True)] == [True, False]


def test_rolling_log_likelihoods_are_those_of_the_adapter_for_transformers(ours, theirs):
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    got = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    assert got == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3, rel=1e-5)


def test_greedy_text_is_that_of_the_adapter_for_transformers(ours, theirs):
    free, (stop,) = {"until": [], "max_gen_toks": 9}, [TEXTS[0][:1]]
    written = ours.generate_until(requests("generate_until", (TEXTS[0], free)), True)[0]
    stop = written[2:4]
    asked = [(text, dict(how)) for text in TEXTS for how in (free, {"until": [stop], "max_gen_toks": 9})]
    got, want = (harness.generate_until(requests("generate_until", *asked), True) for harness in (ours, theirs))
    assert got == want
    assert stop not in got[1] and got[0].startswith(got[1]) and len(got[1]) < len(got[0])


def test_greedy_text_ends_at_any_end_token_and_holds_nothing_else(ours):
    free = requests("generate_until", ("the", {"until": [], "max_gen_toks": 9}))
    (whole,) = ours.generate_until(free, True)
    first = int(ours.model(torch.tensor([ours.tok_encode("the")])).logits[0, -1].argmax())
    several = Tokenizer(ours.reader.inner, ours.reader.eos_id, [7, first])
    assert whole and Harness(ours.model, several).generate_until(free, True) == [""]
    wider = own.padded(ours.model)
    assert wider(torch.tensor([ours.tok_encode("the")])).logits[0, -1].argmax() > 256
    assert Harness(wider, ours.reader).generate_until(free, True) == [whole]


def test_what_the_context_cannot_take_is_cut_and_counted(folder):
    harness = Harness(*load(folder))
    harness.loglikelihood(requests("loglikelihood", ("x" * 100, "y"), ("x", "y")), disable_tqdm=True)
    assert harness.truncated == 1
    with pytest.raises(UserError, match="a continuation has 90 tokens, the model's context takes 64"):
        harness.loglikelihood(requests("loglikelihood", ("x", "y" * 90)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": 0.7}, "only greedy text"),
        ({"do_sample": True}, "only greedy text"),
        ({"num_beams": 3}, "num_beams"),
        ({"max_gen_toks": 64}, "leaves no room in the model's context of 64"),
    ],
)
def test_ways_to_write_that_it_does_not_know_are_refused(ours, how, message):
    with pytest.raises(UserError, match=message):
        ours.generate_until(requests("generate_until", ("x", how)), disable_tqdm=True)


def test_models_that_compare_tokens_have_no_likelihood(tmp_path):
    with pytest.raises(UserError, match="there is no likelihood of a continuation"):
        Harness(own.build(own.COMPARES), own.tokenizer())


def task(folder: Path, rows: list[dict], name: str = "tiny", text: str = YAML) -> Path:
    """A jsonl file and the YAML beside it."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(text.format(name=name, data=f"{name}.jsonl"), encoding="utf-8")
    return folder / f"{name}.yaml"


ROWS = [{"question": f"{n} and {n}?", "choices": ["one", "two", "three"], "gold": n % 3} for n in range(12)]


def test_a_task_out_of_a_file_beside_its_yaml(folder, tmp_path, ours, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    file = task(tmp_path, ROWS)
    model, tokenizer = load(folder)
    results, truncated = run(model, tokenizer, [str(file)], 4, None)
    right = 0
    for row in ROWS:
        asked = requests("loglikelihood", *((f"Q: {row['question']} A:", f" {choice}") for choice in row["choices"]))
        scores = [score for score, _ in ours.loglikelihood(asked, disable_tqdm=True)]
        right += scores.index(max(scores)) == row["gold"]
    assert results["tiny"]["acc,none"] == pytest.approx(right / len(ROWS)) and truncated == 0
    limited = run(model, tokenizer, [str(file)], 4, 3).results["tiny"]
    assert limited["acc,none"] in (0, 1 / 3, 2 / 3, 1) and limited["acc,none"] != results["tiny"]["acc,none"]


def test_the_task_of_the_page_runs(folder, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    for name, language in (("capitals.jsonl", "json"), ("capitals.yaml", "yaml")):
        text = page.partition(f"```{language}\n")[2].partition("```")[0]
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = run(*load(folder), [str(tmp_path / "capitals.yaml")], 8, None).results["capitals"]
    assert found["acc,none"] in [pytest.approx(right / 3) for right in range(4)]


def test_real_questions_get_the_other_adapters_score(shared_data, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    data = shared_data / "eval" / "llmfoundry_piqa.jsonl.gz"
    text = YAML.format(name="piqa_here", data=data).replace("question", "query")
    (tmp_path / "piqa.yaml").write_text(text, encoding="utf-8")
    own.write(tmp_path / "m", own.PYRAMID | {"max_seq_len": 2048})
    got = run(*load(tmp_path / "m"), [str(tmp_path / "piqa.yaml")], 4, 20).results["piqa_here"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs = HFLM(model, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "m"), device="cpu")
    want = evaluate(theirs, open_tasks([str(tmp_path / "piqa.yaml")]), limit=20, log_samples=False, bootstrap_iters=0)
    assert got["acc,none"] == want["results"]["piqa_here"]["acc,none"]


BAD = {
    "no mapping": ("- one\n- two\n", r"bad\.yaml is no task: Expected YAML dict"),
    "broken": ("task: [\n", r"bad\.yaml is no task: while parsing"),
    "no name": ("dataset_path: json\n", "it has no 'task', its name"),
    "no data": (YAML.replace("{data}", "nowhere.jsonl"), r"data_files names .*nowhere\.jsonl, which does not exist"),
    "another column": (YAML.replace("question", "riddle"), r"cannot be built \(UndefinedError: 'riddle' is undefined"),
    "another metric": (
        YAML.replace("metric: acc,", "metric: luck,"),
        r"cannot be built \(ValueError: there is no metric 'luck'",
    ),
    "another kind": (YAML.replace("multiple_choice", "telepathy"), "cannot be built"),
    "another split": (YAML.replace("test_split: test", "test_split: exam"), r"cannot be built \(KeyError: 'exam'"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_task_that_is_none_is_told_in_one_line(tmp_path, what):
    text, message = BAD[what]
    file = task(tmp_path, ROWS, "bad", text)
    with pytest.raises(UserError, match=message) as caught:
        open_tasks([str(file)])
    assert "\n" not in str(caught.value)


def test_a_name_that_nothing_has(tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants
    from lm_eval.tasks import TaskManager

    def here(include_defaults):  # in place of the harness's own tasks, whose index takes long
        return TaskManager(None, tmp_path, include_defaults=False)

    monkeypatch.setattr("moeforge.evaluate.harness.TaskManager", here)
    task(tmp_path, ROWS, "arc_easy", YAML.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(UserError, match=r"there is no task 'arc_esay'\. Did you mean 'arc_easy'\?"):
        open_tasks(["arc_esay"])
    for library, endpoint in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(library, endpoint, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} seconds before it asks again"))
    with pytest.raises(UserError, match=r"task arc_easy cannot be built \(.*It downloads its data; a YAML file"):
        open_tasks(["arc_easy"])
    assert not constants.HF_HUB_OFFLINE


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml is no task: .*No such file"):
        open_tasks([str(tmp_path / "none.yaml")])
