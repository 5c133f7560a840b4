"""The routes, asked by the openai client and by hand."""

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Served, events

openai = pytest.importorskip("openai", reason="the client that everybody uses")


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("tiny").id) == ("tiny", "tiny")
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("large")
    assert refused.value.code == "model_not_found"


def test_a_completion_has_a_text_a_reason_and_a_count(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="def ", max_tokens=5, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 5, 10)


def test_equal_seeds_give_equal_texts_and_n_gives_others(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "def ", "max_tokens": 12, "seed": 4}
    one, other = (client.completions.create(**asked, n=3) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in other.choices] and len({*texts}) == 3
    assert texts[0] == client.completions.create(**asked).choices[0].text
    assert one.usage.prompt_tokens == 5 and one.usage.completion_tokens == 36


def test_a_stream_says_what_the_whole_answer_says(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "def ", "max_tokens": 20, "seed": 9, "n": 2}
    whole = client.completions.create(**asked)
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or ""
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage.model_copy(update={"prompt_tokens_details": usage.prompt_tokens_details})


def test_echo_gives_the_prompt_with_its_probabilities(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "def f", "echo": True, "logprobs": 2, "temperature": 0}
    answer = client.completions.create(**asked, max_tokens=3).choices[0]
    known = answer.logprobs
    assert answer.text.startswith("def f") and len(known.tokens) == len(known.token_logprobs) == 8
    assert all(value < 0 for value in known.token_logprobs) and all(len(top) == 2 for top in known.top_logprobs)
    only = client.completions.create(**asked, max_tokens=0).choices[0]
    assert only.text == "def f" and only.logprobs.token_logprobs == known.token_logprobs[:5]
    # Greedy: what was written is the likeliest there was.
    assert known.token_logprobs[5:] == [max(top.values()) for top in known.top_logprobs[5:]]
    told = client.completions.create(**asked, max_tokens=0, stream=True)
    assert [choice.text for chunk in told for choice in chunk.choices] == ["def f", ""]


def test_stop_strings_are_not_part_of_the_text(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "def ", "max_tokens": 60, "seed": 1}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[10:12]
    cut = client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_prompts_come_in_four_forms(post: Any) -> None:
    forms = ["ab", ["ab", "cd"], [256, 97, 98], [[256, 97, 98], [256, 99, 100]]]
    answers = [post("/v1/completions", prompt=form, max_tokens=4, temperature=0).json()["choices"] for form in forms]
    assert [len(choices) for choices in answers] == [1, 2, 1, 2]
    assert answers[0][0]["text"] == answers[1][0]["text"] == answers[2][0]["text"] == answers[3][0]["text"]


MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]


def test_a_chat_goes_through_the_models_template(client: Any, post: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, temperature=0)
    by_hand = client.completions.create(
        model="tiny", prompt=[*b"system: short\nuser: hello\nassistant:"], max_tokens=6, temperature=0
    )
    assert answer.choices[0].message.content == by_hand.choices[0].text
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    again = post(
        "/v1/chat/completions", messages=[MESSAGES[0], {"role": "user", "content": parts}], max_tokens=6, temperature=0
    )
    assert again.json()["choices"][0]["message"]["content"] == answer.choices[0].message.content


def test_tools_go_through_the_template(post: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    counts = [
        post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, **more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"tools": tools}, {"tools": tools, "tool_choice": "none"})
    ]
    assert counts[1] > counts[0] == counts[2]


def test_a_chat_streams_with_usage_and_logprobs(client: Any) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "seed": 3, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    known = [one for chunk in chunks for choice in chunk.choices if choice.logprobs for one in choice.logprobs.content]
    assert text == whole.message.content and known == whole.logprobs.content
    assert all(len(one.top_logprobs) == 3 for one in known)
    assert chunks[-1].usage.completion_tokens == 9 and chunks[0].choices[0].delta.role == "assistant"


def test_responses(client: Any) -> None:
    asked = {"model": "tiny", "input": "hello", "instructions": "short", "max_output_tokens": 6, "temperature": 0}
    answer = client.responses.create(**asked)
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, temperature=0)
    assert answer.output_text == chat.choices[0].message.content and answer.status == "incomplete"
    streamed = list(client.responses.create(**asked, stream=True))
    assert "".join(one.delta for one in streamed if one.type == "response.output_text.delta") == answer.output_text
    assert (streamed[0].type, streamed[-1].type) == ("response.created", "response.incomplete")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_has_the_form_that_a_schema_says(client: Any, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=form, max_tokens=150, seed=seed, temperature=1.5
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema_rs.validate(SCHEMA, json.loads(answer.choices[0].message.content))


def test_tokenize_and_back(post: Any) -> None:
    tokens = post("/tokenize", prompt="häuser").json()["tokens"]
    assert tokens == [256, *"häuser".encode()]
    assert post("/detokenize", tokens=tokens).json()["prompt"] == "häuser"


def test_routing_is_shown_where_it_was_asked_for(post: Any) -> None:
    answer = post("/v1/completions", prompt="a", max_tokens=3, temperature=0).json()["choices"][0]
    assert [sorted(map(int, one)) for one in answer["routing"]] == [[0, 1]] * 3
    assert all(len(experts) == 2 for one in answer["routing"] for experts in one.values())


def test_metrics_count(server: Served, post: Any) -> None:
    before = server.metric("moeforge_tokens_written_total")
    post("/v1/completions", prompt="a", max_tokens=7, ignore_eos=True)
    assert server.metric("moeforge_tokens_written_total") == before + 7
    assert server.metric("moeforge_kv_blocks_used") == server.metric("moeforge_running_requests") == 0
    assert (
        server.metric("moeforge_machine_gigabytes_per_second")
        > server.metric("moeforge_weight_gigabytes_per_second")
        > 0
    )
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("time_to_first_token", "time_per_token", "queue"):
        assert f"moeforge_{name}_seconds_bucket" in text
    assert 'moeforge_expert_tokens_total{expert="3",layer="1"}' in text and "moeforge_load_entropy" in text


def test_a_contrast_writes_another_text_and_is_refused_where_there_is_none(post: Any) -> None:
    def text(**fields: Any) -> str:
        return post("/v1/completions", prompt="a", max_tokens=20, temperature=0, ignore_eos=True, **fields).json()[
            "choices"
        ][0]["text"]

    assert text(contrast={"beta": 0.0}) == text() != text(contrast={"beta": 2.0, "rank": 4})
    refused = post("/v1/completions", prompt="a", contrast={"rank": 5})
    assert refused.status_code == 400 and "no expert of rank 5" in refused.json()["error"]["message"]


REFUSED = {
    "no such model": ({"model": "large", "prompt": "a"}, 404, "model_not_found"),
    "no prompt": ({}, 400, "invalid_value"),
    "an empty list": ({"prompt": []}, 400, "invalid_value"),
    "too long": ({"prompt": "a" * 400}, 400, "context_length_exceeded"),
    "a megabyte": ({"prompt": "a" * (1 << 20)}, 400, "context_length_exceeded"),
    "no such token": ({"prompt": [70000]}, 400, None),
    "temperature": ({"prompt": "a", "temperature": -1}, 400, "invalid_value"),
    "n": ({"prompt": "a", "n": 1000}, 400, "invalid_value"),
    "bias": ({"prompt": "a", "logit_bias": {"a": 1}}, 400, "invalid_value"),
    "bias of no token": ({"prompt": "a", "logit_bias": {"70000": 1}}, 400, None),
    "an empty stop": ({"prompt": "a", "stop": ""}, 400, "invalid_value"),
    "nothing to do": ({"prompt": "a", "max_tokens": 0}, 400, "invalid_value"),
    "an unknown field": ({"prompt": "a", "beams": 4}, 400, "invalid_value"),
    "a suffix": ({"prompt": "a", "suffix": "b"}, 400, "unsupported"),
    "too many logprobs": ({"prompt": "a", "logprobs": 999}, 400, "invalid_value"),
    "a huge number": ({"prompt": "a", "seed": 10**30}, 400, "invalid_value"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, stream: bool, post: Any) -> None:
    fields, status, code = REFUSED[case]
    answer = post("/v1/completions", **fields, stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["message"]


BODIES = [b"{", b"\xff\xfe", b"", b"[]", b"3", b'{"prompt": NaN}', b'{"prompt": "\xff"}', b"null", b"[" * 5000]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:12]))
def test_what_is_no_request(body: bytes, server: Served) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
        answer = httpx.post(f"{server.url}{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", answer.text


def test_paths_and_methods_that_are_not_there(server: Served) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


@pytest.mark.parametrize(
    "form", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}], ids=str
)
def test_forms_that_are_none(form: Any, post: Any) -> None:
    answer = post("/v1/chat/completions", messages=MESSAGES, response_format=form)
    assert answer.status_code == 400, answer.text


def test_images_are_refused(post: Any) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    answer = post("/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = (
    "prompt",
    "max_tokens",
    "temperature",
    "stop",
    "n",
    "logprobs",
    "stream",
    "seed",
    "logit_bias",
    "echo",
    "top_p",
)


@settings(max_examples=60)
@given(fields=st.dictionaries(st.sampled_from(NAMES), json_values))
def test_any_fields_get_an_answer_or_an_error_object(server: Served, fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 2} | fields)
    answer = httpx.post(f"{server.url}/v1/completions", content=body, timeout=60)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[-5], [2**70], [[97], [2**70]]], ids=str)
def test_ids_that_are_no_tokens_are_refused_before_they_are_echoed(post: Any, prompt: Any, stream: bool) -> None:
    answer = post("/v1/completions", prompt=prompt, max_tokens=2, echo=True, stream=stream)
    assert answer.status_code == 400 and "there is no token" in answer.json()["error"]["message"]


def test_events_end_with_done(post: Any) -> None:
    answer = post("/v1/completions", prompt="a", max_tokens=2, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and events(answer)[-1] == "[DONE]"
