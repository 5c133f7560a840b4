"""Streaming with the cache against recomputing the whole document for every token."""

from itertools import product

import pytest
import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import Sampling, Writer, generate
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


@pytest.mark.parametrize("prompt", ["", "x", "some prompt"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5, max_tokens=20)], ids=["greedy", "drawn"])
def test_the_cache_changes_nothing(model, tokenizer, prompt, sampling):
    steps = list(generate(model, tokenizer, prompt, sampling))
    assert [step.token_id for step in steps] == from_scratch(model, tokenizer, prompt, sampling)
    assert [step.stop is None for step in steps] == [True] * (len(steps) - 1) + [False]
    assert len(steps) == 20 or steps[-1].stop == "end of document"


def test_the_seed_decides(model, tokenizer):
    def text(seed: int) -> str:
        return "".join(step.text for step in generate(model, tokenizer, "a", Sampling(seed=seed, max_tokens=20)))

    assert text(1) == text(1) != text(2)


def test_streamed_text_is_the_decoded_text(model, tokenizer):
    steps = list(generate(model, tokenizer, "a", Sampling(seed=3, temperature=2, max_tokens=40)))
    assert "".join(step.text for step in steps) == tokenizer.decode([step.token_id for step in steps])


def test_it_stops_where_the_model_ends_the_document(even_model, tokenizer):
    for seed in range(60):
        sampling = Sampling(temperature=1, seed=seed, max_tokens=30)
        steps = list(generate(even_model, tokenizer, "a", sampling))
        if steps and steps[-1].stop == "end of document":
            break
    else:
        pytest.fail("no seed ended a document")
    ids = [step.token_id for step in steps]
    assert len(ids) < 30 and tokenizer.eos_id not in ids
    assert ids == from_scratch(even_model, tokenizer, "a", sampling)


def test_any_of_several_end_tokens_ends_the_document(model, tokenizer):
    sampling = Sampling(seed=6, max_tokens=20)
    ids = from_scratch(model, tokenizer, "some", sampling)
    for place in (place for place, token in enumerate(ids[:4]) if token not in ids[:place]):
        several = Tokenizer(tokenizer.inner, tokenizer.eos_id, [7, ids[place]])
        steps = list(generate(model, several, "some", sampling))
        assert [step.token_id for step in steps] == ids[:place]
        assert all(step.stop == "end of document" for step in steps[-1:])
    assert place > 0


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5, max_tokens=20)], ids=["greedy", "drawn"])
def test_what_is_no_token_is_never_written(model, tokenizer, sampling):
    wider = padded(model)
    assert wider(torch.tensor([[tokenizer.eos_id, *b"ab"]])).logits[0, -1].argmax() > 256
    steps = [list(generate(each, tokenizer, "ab", sampling)) for each in (wider, model)]
    assert steps[0] == steps[1]


def test_a_long_context_takes_memory_only_for_what_it_holds_and_changes_nothing(model, tokenizer):
    long = Decoder(model.config.replace(max_seq_len=1_000_000)).eval()
    long.load_state_dict(model.state_dict())
    one, whole = Writer(long, tokenizer), Writer(model, tokenizer)
    for layer in whole._cache.layers.values():  # room for all of the context from the start
        layer.tensors = [tensor.new_zeros(1, tensor.shape[1], 48, tensor.shape[3]) for tensor in layer.tensors]
    for writer in (one, whole):
        writer.read("some")
    for first, second in zip(one.write(GREEDY), whole.write(GREEDY), strict=True):
        assert first == second and torch.equal(one._logits, whole._logits)
    held = [tensor for layer in one._cache.layers.values() for tensor in layer.tensors]
    per_token = 2 * model.config.num_layers * model.config.d_model * 4  # keys and values, float32
    assert one.length * per_token <= sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) <= 2 * one.length * per_token


def test_it_stops_when_the_context_is_full(model, tokenizer):
    steps = list(generate(model, tokenizer, "abc", Sampling(temperature=0, max_tokens=1000)))
    assert len(steps) == model.config.max_seq_len - 1 - 3
    assert steps[-1].stop == "context full"
    assert [step.token_id for step in steps] == from_scratch(model, tokenizer, "abc", GREEDY.replace(max_tokens=1000))


def test_a_prompt_that_fills_the_context_is_refused(model, tokenizer):
    room = model.config.max_seq_len - 2
    assert len(list(generate(model, tokenizer, "a" * room, GREEDY))) == 1
    with pytest.raises(UserError, match=f"the text has {room + 1} tokens, but the context has room for {room} "):
        generate(model, tokenizer, "a" * (room + 1), GREEDY)


def test_experts_are_those_of_the_tokens_own_position(model, tokenizer):
    steps = list(generate(model, tokenizer, "abc", GREEDY))
    ids = [tokenizer.eos_id, *b"abc", *(step.token_id for step in steps)]
    wanted = choices(model(torch.tensor([ids])))[4:]
    assert [step.experts for step in steps] == [{n: choice.experts for n, choice in row.items()} for row in wanted]
    assert set(steps[0].experts) == {1, 2}


def test_a_document_goes_on_after_a_turn(model, tokenizer):
    writer = Writer(model, tokenizer)
    writer.read("ab")
    first = [step.token_id for step in writer.write(GREEDY.replace(max_tokens=5))]
    writer.read("cd")
    second = [step.token_id for step in writer.write(GREEDY.replace(max_tokens=5))]
    ids = [tokenizer.eos_id, *b"ab", *first, *b"cd"]
    for token in second:
        assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)
    assert writer.length == len(ids)


def test_turns_join_as_they_are_typed(model):
    words = Tokenizer(metaspace(), 5)
    writer = Writer(model, words)
    for text in ("a", "b", " a", "ba"):
        writer.read(text)
    assert words.decode(writer._unread) == "ab aba"
    written = "".join(step.text for step in writer.write(GREEDY.replace(max_tokens=4)))
    writer.read("b")
    assert words.decode(writer._text) == "ab aba" + written + "b"


def test_a_text_that_is_refused_leaves_the_document_as_it_was(model, tokenizer):
    writer = Writer(model, tokenizer)
    writer.read("ab")
    with pytest.raises(UserError):
        writer.read("c" * 100)
    ids = [step.token_id for step in writer.write(GREEDY)]
    assert ids == from_scratch(model, tokenizer, "ab", GREEDY)


def test_a_pass_that_is_interrupted_leaves_the_document_as_it_was(model, tokenizer):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    writer = Writer(model, tokenizer)
    writer.read("ab")
    steps = writer.write(GREEDY)
    ids = [next(steps).token_id, next(steps).token_id]
    hook = model.blocks[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    hook.remove()
    ids += [step.token_id for step in writer.write(GREEDY.replace(max_tokens=18))]
    assert ids == from_scratch(model, tokenizer, "ab", GREEDY)


def test_an_interrupted_pass_leaves_windows_as_they_were(model, tokenizer):
    near = Decoder(model.config.replace(layers={0: {"window": 3}, 1: {"window": 1}})).eval()
    near.load_state_dict(model.state_dict())
    writer, whole = Writer(near, tokenizer), Writer(near, tokenizer)
    for one in (writer, whole):
        one.read("ab")
        next(one.write(GREEDY))
        one.read("cdefgh")
    attention, forward = near.blocks[-1].attention, near.blocks[-1].attention.forward
    attention.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(writer.write(GREEDY))
    attention.forward = forward
    next(writer.write(GREEDY)), next(whole.write(GREEDY))
    assert torch.equal(writer._logits, whole._logits)


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
        assert len(list(generate(model, tokenizer, "a", GREEDY, unsafe_batch_dependent=True))) > 0
