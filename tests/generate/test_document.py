"""A document through the engine against recomputing all of it for every token."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import ALONE, Document, End, Engine, Sampling, Token, Written, engine_for, generate
from moeforge.generate.sample import draw
from moeforge.generate.trace import choices
from moeforge.models import Decoder, ModelConfig
from tests.data.test_tokenizers import metaspace
from tests.hub.own import padded

GREEDY = Sampling(temperature=0, max_tokens=20)


@torch.no_grad()
def from_scratch(model: Decoder, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> list[int]:
    """Ids of the continuation, without any cache."""
    ids, generator = [tokenizer.eos_id, *tokenizer.encode(prompt)], sampling.generator()
    start = len(ids)
    while len(ids) < min(start + sampling.max_tokens, model.config.max_seq_len):
        token = draw(model(torch.tensor([ids])).logits[0, -1], sampling, generator)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return ids[start:]


def ids_of(written: Written) -> list[int]:
    return [token.token_id for token in written.tokens]


def more(document: Document, sampling: Sampling, show_experts: bool = False) -> list[int]:
    """Ids of what the model adds."""
    events = document.write(sampling, show_experts)
    return [event.token_id for event in events if isinstance(event, Token)]


@pytest.fixture
def engine(model: Decoder, tokenizer: Tokenizer) -> Iterator[Engine]:
    with engine_for(model, tokenizer, ALONE) as running:
        yield running


@pytest.mark.parametrize("prompt", ["", "x", "some prompt"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5, max_tokens=20)], ids=["greedy", "drawn"])
def test_the_cache_changes_nothing(model, tokenizer, prompt, sampling):
    written = generate(model, tokenizer, prompt, sampling)
    assert ids_of(written) == from_scratch(model, tokenizer, prompt, sampling)
    assert written.end.stop == ("max_tokens" if len(written.tokens) == 20 else "end of document")


def test_the_seed_decides(model, tokenizer):
    def text(seed: int) -> str:
        return generate(model, tokenizer, "a", Sampling(seed=seed, max_tokens=20)).text

    assert text(1) == text(1) != text(2)


def test_streamed_text_is_the_decoded_text(model, tokenizer):
    written = generate(model, tokenizer, "a", Sampling(seed=3, temperature=2, max_tokens=40))
    assert written.text == tokenizer.decode(ids_of(written)) != ""


def test_it_stops_where_the_model_ends_the_document(even_model, tokenizer):
    for seed in range(60):
        sampling = Sampling(temperature=1, seed=seed, max_tokens=30)
        written = generate(even_model, tokenizer, "a", sampling)
        if written.tokens and written.end.stop == "end of document":
            break
    else:
        pytest.fail("no seed ended a document")
    ids = ids_of(written)
    assert len(ids) < 30 and tokenizer.eos_id not in ids
    assert ids == from_scratch(even_model, tokenizer, "a", sampling)


def test_any_of_several_end_tokens_ends_the_document(model, tokenizer):
    sampling = Sampling(seed=6, max_tokens=20)
    ids = from_scratch(model, tokenizer, "some", sampling)
    for place in (place for place, token in enumerate(ids[:4]) if token not in ids[:place]):
        several = Tokenizer(tokenizer.inner, tokenizer.eos_id, [7, ids[place]])
        written = generate(model, several, "some", sampling)
        assert ids_of(written) == ids[:place] and written.end.stop == "end of document"
    assert place > 0


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5, max_tokens=20)], ids=["greedy", "drawn"])
def test_what_is_no_token_is_never_written(model, tokenizer, sampling):
    wider = padded(model)
    assert wider(torch.tensor([[tokenizer.eos_id, *b"ab"]])).logits[0, -1].argmax() > 256
    assert ids_of(generate(wider, tokenizer, "ab", sampling)) == ids_of(generate(model, tokenizer, "ab", sampling))


def test_it_stops_when_the_context_is_full(model, tokenizer):
    written = generate(model, tokenizer, "abc", Sampling(temperature=0, max_tokens=1000))
    assert len(written.tokens) == model.config.max_seq_len - 1 - 3
    assert written.end.stop == "context full"
    assert ids_of(written) == from_scratch(model, tokenizer, "abc", GREEDY.replace(max_tokens=1000))


def test_a_prompt_that_fills_the_context_is_refused(model, tokenizer):
    room = model.config.max_seq_len - 2
    assert len(generate(model, tokenizer, "a" * room, GREEDY).tokens) == 1
    with pytest.raises(UserError, match=f"the text has {room + 1} tokens, but the context of 48 has room for {room}$"):
        generate(model, tokenizer, "a" * (room + 1), GREEDY)


@pytest.mark.parametrize("prompt", ["abc", "a" * 40])
def test_experts_are_those_of_the_tokens_own_position(model, tokenizer, prompt):
    written = generate(model, tokenizer, prompt, GREEDY)  # the second ends where the context is full
    ids = [tokenizer.eos_id, *prompt.encode(), *ids_of(written)]
    wanted = choices(model(torch.tensor([ids])))[1 + len(prompt) :]
    assert [t.experts for t in written.tokens] == [{n: choice.experts for n, choice in row.items()} for row in wanted]
    assert set(written.tokens[0].experts) == {1, 2}


def test_asking_for_experts_changes_no_token_and_stops_alike(engine):
    for how in (GREEDY, GREEDY.replace(stop=("\x00",)), Sampling(seed=5, max_tokens=3)):
        documents = [Document(engine), Document(engine)]
        ends = []
        for document, shown in zip(documents, (True, False), strict=True):
            document.read("ab")
            *_, end = document.write(how, shown)
            assert isinstance(end, End)
            ends.append((end.stop, end.text, end.usage.written_tokens))
        assert documents[0].tokens == documents[1].tokens and ends[0] == ends[1]


def test_a_document_goes_on_after_a_turn(model, tokenizer, engine):
    document = Document(engine)
    document.read("ab")
    first = more(document, GREEDY.replace(max_tokens=5))
    document.read("cd")
    second = more(document, GREEDY.replace(max_tokens=5))
    ids = [tokenizer.eos_id, *b"ab", *first, *b"cd"]
    for token in second:
        assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)
    assert document.tokens == ids


def test_what_was_read_of_a_document_is_not_read_again(engine):
    document = Document(engine)
    document.read("a" * 20)
    more(document, GREEDY.replace(max_tokens=5))
    before = engine.report().tokens_read
    document.read("b")
    more(document, GREEDY.replace(max_tokens=5))
    assert engine.report().tokens_read - before == len("aaaa") + 5 + 1 + 1  # what is past the last whole block


def test_turns_join_as_they_are_typed(model):
    words = Tokenizer(metaspace(), 5)
    with engine_for(model, words, ALONE) as running:
        document = Document(running)
        for text in ("a", "b", " a", "ba"):
            document.read(text)
        assert words.decode(document.tokens[1:]) == "ab aba"
        written = "".join(event.text for event in document.write(GREEDY.replace(max_tokens=4)))
        document.read("b")
        assert words.decode(document.tokens[1:]) == "ab aba" + written + "b"


def test_a_text_that_is_refused_leaves_the_document_as_it_was(model, tokenizer, engine):
    document = Document(engine)
    document.read("ab")
    with pytest.raises(UserError):
        document.read("c" * 100)
    assert more(document, GREEDY) == from_scratch(model, tokenizer, "ab", GREEDY)


def test_who_stops_listening_can_go_on_from_there(model, tokenizer, engine):
    document = Document(engine)
    document.read("ab")
    events = document.write(GREEDY)
    ids = [next(events).token_id, next(events).token_id]
    events.close()
    ids += more(document, GREEDY.replace(max_tokens=18))
    assert ids == from_scratch(model, tokenizer, "ab", GREEDY)


def test_routers_that_compare_tokens_write_only_when_asked(tokenizer: Tokenizer) -> None:
    select = {"type": "merged", "over": "segment_before", "segment": 4}
    before = {"select": select, "score": "logits", "weigh": "softmax", "losses": []}
    routers = ({"select": "expert_choice", "losses": []}, {"capacity": [{"type": "capacity"}]}, before)
    for router, where in product(routers, ("layer_01", "attention_01")):
        if router is before and where == "attention_01":
            continue  # heads are not merged
        moe = {"moe": {"experts": {"num_experts": 4, "d_expert": 8}, "router": router}}
        layer = moe if where == "layer_01" else {"attention": {"type": "routed", "num_experts": 4, "router": router}}
        shape = {"vocab_size": 257, "d_model": 16, "num_layers": 2, "num_heads": 2, "layers": {1: layer}}
        model = Decoder(ModelConfig.model_validate(shape)).eval()
        with pytest.raises(UserError, match=f"in {where} a token's experts depend on other tokens than itself"):
            generate(model, tokenizer, "a", GREEDY)
        assert generate(model, tokenizer, "a", GREEDY, unsafe_batch_dependent=True).tokens
