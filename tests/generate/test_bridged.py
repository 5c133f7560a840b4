"""Families without a table of ours: the same engine over transformers, with transformers' own text."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from moeforge.cli.main import main
from moeforge.errors import UserError
from moeforge.generate import Sampling, Settings, open_engine
from moeforge.hub.families import FAMILIES
from tests.generate.driving import drive, sampling

transformers = pytest.importorskip("transformers", reason="runs these families: pip install 'moeforge[hf]'")
FOREIGN = ("dots1", "flex_olmo", "glm4_moe_lite", "minimax_m2", "jetmoe")


def folder_of(family: str, folder: Path) -> tuple[Any, Path]:
    from tests.hub import families

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    name, changes = families.FAMILIES.get(family, ("JetMoeForCausalLM", {}))
    model = families.build(family, **changes) if family in families.FAMILIES else jetmoe(name)
    model.eval().save_pretrained(folder)
    words = {str(number): number for number in range(63)} | {"</s>": 63}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0")).save(str(folder / "tokenizer.json"))
    return model, folder


def jetmoe(name: str) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8}
    config = transformers.JetMoeConfig(**sizes, intermediate_size=24, num_local_experts=4, max_position_embeddings=64)
    return getattr(transformers, name)(config)


PROMPT = [5, 9, 17, 33, 40]


@pytest.mark.parametrize("family", FOREIGN)
def test_greedy_text_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    assert family not in FAMILIES
    model, folder = folder_of(family, tmp_path)
    with engine_of(folder) as running:
        never = {"eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [*running.tokenizer.end_ids]}
        told = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, **never)
        asked = Sampling(temperature=0, max_tokens=8, ignore_end=True)
        got = drive(running, [(PROMPT, asked), ([7, 8], asked), (PROMPT, asked)])
        assert list(got[0].tokens) == list(got[2].tokens) == told[0, len(PROMPT) :].tolist()
        assert "transformers' " in running.about and "one request at a time" in running.about


def engine_of(folder: Path, **settings: Any) -> Any:
    return open_engine(folder, Settings(**settings))


def test_texts_do_not_feel_each_other(tmp_path: Path) -> None:
    _, folder = folder_of("dots1", tmp_path)
    with engine_of(folder) as quiet, engine_of(folder, token_budget=3, max_running=2) as busy:
        (alone,) = drive(quiet, [(PROMPT, sampling(7))])
        crowd = [([index + 3, *range(10, 20 + index)], sampling(index)) for index in range(5)]
        assert drive(busy, [*crowd, (PROMPT, sampling(7))])[5][:2] == alone[:2]


def test_logprobs_of_a_prompt(tmp_path: Path) -> None:
    model, folder = folder_of("dots1", tmp_path)
    with engine_of(folder) as running:
        read, *_ = running.write(PROMPT, Sampling(max_tokens=0, prompt_logprobs=2))
    wanted = model(torch.tensor([PROMPT])).logits[0].detach().log_softmax(-1)
    for place in range(1, len(PROMPT)):
        found, others = read.tokens[place]
        assert found.logprob == pytest.approx(float(wanted[place - 1, PROMPT[place]]), abs=1e-4) and len(others) == 2


def test_what_the_bridge_cannot_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = folder_of("dots1", tmp_path)
    with pytest.raises(UserError, match="as stored, float32, bf16"):
        engine_of(folder, weights="int8")
    with pytest.raises(UserError, match="knows no domains"):
        open_engine(folder, domain="code")
    code = main(["generate", str(folder), "5", "--show-experts"])
    assert code == 2 and "does not tell its tokens' experts" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing_known"}))
    with pytest.raises(UserError, match="transformers cannot open it"):
        engine_of(folder)
