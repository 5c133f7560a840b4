"""Every token's own experts against the router's own route."""

import pytest
import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import trace
from moeforge.generate.trace import choices
from moeforge.models import Decoder, ModelConfig
from tests.generate.conftest import SHAPE


def test_each_token_has_the_experts_of_its_row(model, tokenizer):
    text = "def f(x): return 1"
    found = trace(model, tokenizer, text)
    assert "".join(token.piece for token in found) == text
    routings = model(torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])).routings
    for row, token in enumerate(found, start=1):
        assert set(token.choices) == {1, 2}
        for layer, choice in token.choices.items():
            route = routings[layer].route
            mine = route.token == row
            wanted = dict(zip(route.expert[mine].tolist(), route.weight[mine].tolist(), strict=True))
            assert dict(zip(choice.experts, choice.weights, strict=True)) == pytest.approx(wanted)
            assert choice.weights == sorted(choice.weights, reverse=True)


def test_it_unpacks_as_pairs(model, tokenizer):
    ((piece, by_layer),) = trace(model, tokenizer, "a")
    experts, weights = by_layer[2]
    assert (piece, len(experts), len(weights)) == ("a", 2, 2)


def test_rows_of_a_batch_are_counted_through(model):
    ids = torch.arange(10).view(2, 5)
    batched, alone = choices(model(ids)), choices(model(ids[1:]))
    assert [row[1].experts for row in batched[5:]] == [row[1].experts for row in alone]


def test_a_token_cut_into_heads_has_the_experts_of_all_its_rows():
    moe = {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": {"k": 1}}, "heads": 2}
    output = Decoder(ModelConfig(vocab_size=9, d_model=16, num_layers=1, num_heads=2, moe=moe))(torch.arange(5)[None])
    route = output.routings[0].route
    for token, row in enumerate(choices(output)):
        assert sorted(row[0].experts) == sorted(route.expert[route.token // 2 == token].tolist())


def test_an_empty_text_has_no_tokens_and_a_long_one_is_refused(model, tokenizer):
    assert trace(model, tokenizer, "") == []
    with pytest.raises(UserError, match="the text has 48 tokens, the model's context takes 47"):
        trace(model, tokenizer, "a" * 48)


def test_merged_experts_are_those_that_have_a_part(tokenizer: Tokenizer) -> None:
    gate = {"type": "lookup", "by": "token", "num_ids": 257}
    select = {"type": "merged", "k": 2, "over": "equal_scores"}
    router = {"gate": gate, "score": "logits", "select": select, "weigh": "softmax", "losses": []}
    merged = Decoder(ModelConfig.model_validate(SHAPE | {"moe": SHAPE["moe"] | {"router": router}})).eval()
    for token in trace(merged, tokenizer, "abca"):
        for layer, choice in token.choices.items():
            row = merged.moe_layers[layer].router.gate.table[tokenizer.encode(token.piece)[0]]
            best = row.topk(2)
            assert choice.experts == best.indices.tolist()
            assert choice.weights == pytest.approx(best.values.softmax(0).tolist(), rel=1e-5)
