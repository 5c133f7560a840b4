"""Every text that a grammar allowed to be finished has the form it says, whatever the model would rather write."""

import json
import re
from typing import Any

import pytest

from moeforge.errors import UserError
from moeforge.generate import Sampling
from moeforge.generate.grammar import Grammar, Matcher
from moeforge.models import Decoder, ModelConfig
from tests.generate.driving import TOKENIZER, drive, engine, sampling

pytest.importorskip("llguidance", reason="structured output: pip install 'moeforge[serve]'")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="checks what came out")

SHAPE = {"vocab_size": 257, "d_model": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 512}
EXPERTS = {"experts": {"num_experts": 2, "d_expert": 8}}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"enum": ["rot", "grün", 3]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "null"}},
        "required": ["a"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(ModelConfig.model_validate({**SHAPE, "moe": EXPERTS})).eval()


def texts(model: Decoder, grammar: dict[str, Any]) -> list[str]:
    asked = sampling(max_tokens=300, grammar=grammar, ignore_end=False, logprobs=None)
    with engine(model) as running:
        got = drive(running, [([256, 97], asked.replace(seed=seed)) for seed in range(6)])
    assert {one.end.stop for one in got} <= {"end of document", "max_tokens"}
    return [TOKENIZER.decode(one.tokens) for one in got if one.end.stop == "end of document"]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_json_fits_its_schema(model: Decoder, schema: dict[str, Any]) -> None:
    written = texts(model, {"json_schema": schema})
    assert written
    for text in written:
        jsonschema_rs.validate(schema, json.loads(text))


@pytest.mark.parametrize("regex", [r"[a-c]{3,5}", r"(ja|nein)!", r"[0-9]{4}-[0-9]{2}", "äö+"])
def test_texts_match_their_expression(model: Decoder, regex: str) -> None:
    written = texts(model, {"regex": regex})
    assert written and all(re.fullmatch(regex, text) for text in written)


def test_the_end_is_allowed_only_where_the_text_is_complete() -> None:
    matcher = Matcher(Grammar(regex="ab"), TOKENIZER)
    for letter in b"ab":
        assert (~matcher.forbidden(257)).nonzero().flatten().tolist() == [letter]
        matcher.take(letter)
    assert (~matcher.forbidden(300)).nonzero().flatten().tolist() == [256]


@pytest.mark.parametrize("grammar", [{"regex": "a("}, {"json_schema": {"type": "colour"}}], ids=str)
def test_what_is_no_grammar_is_refused_when_it_is_asked_for(model: Decoder, grammar: dict[str, Any]) -> None:
    with engine(model) as running, pytest.raises(UserError, match="grammar: "):
        running.submit([256], Sampling(grammar=grammar), lambda event: None)
