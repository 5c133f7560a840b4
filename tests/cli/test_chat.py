"""``moeforge chat`` with its input piped in."""

import shutil

import pytest

from moeforge.cli.chat import HELP, MESSAGES, TEXT, Session
from moeforge.errors import UserError
from moeforge.generate import ALONE, Sampling, open_engine

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


def talk(call, model, *lines: str, greeting: str = TEXT) -> str:
    """What is printed after the greeting."""
    code, out, err = call("chat", model, "--seed=1", "--max-tokens=3", stdin="".join(f"{line}\n" for line in lines))
    assert (code, err) == (0, "")
    assert out.startswith(greeting + HELP)
    return out.removeprefix(greeting + HELP + "\n")


@pytest.fixture
def with_template(run_folder, tmp_path):
    """The trained model, as one to converse with."""
    model = shutil.copytree(run_folder / "model", tmp_path / "conversing")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def test_the_end_of_input_and_exit_both_leave(call, run_folder):
    assert talk(call, run_folder) == "\n"
    assert talk(call, run_folder, "/exit", "never read") == ""


def test_turns_continue_one_document(call, run_folder):
    alone = call("generate", run_folder, "para", "--temperature=0", "--max-tokens=6").out
    turns = talk(call, run_folder, "/temp 0", "para", "", "/exit").splitlines()
    assert turns[0] == "temperature 0"
    assert "para" + "".join(turns[1:]) == alone.rstrip("\n")


def test_a_backslash_at_the_end_is_a_line_break_and_two_slashes_are_one(run_folder):
    from moeforge.cli.talk import open_talks

    with open_engine(run_folder, ALONE) as engine:
        session = Session(open_talks(engine, run_folder), Sampling(temperature=0, max_tokens=1))
        before = [*session.talk.document.tokens]
        assert session.take("//ab\\")
        written = session.talk.document.tokens[len(before) :]
        assert engine.tokenizer.decode(written[:4]) == "/ab\n" and len(written) == 5
        with pytest.raises(UserError, match=r"'/rest' is no command\. Did you mean 'reset'\?"):
            session.take("/rest")
        assert session.take("/reset")
        assert session.talk.document.tokens == before


def test_messages_go_through_the_template(call, run_folder, with_template):
    turns = talk(call, with_template, "/temp 0", "hi", "", "you", "/exit", greeting=MESSAGES).splitlines()
    assert "an empty line says nothing: type a message" in turns
    pytest.importorskip("jinja2")
    greedy = ["--temperature=0", "--max-tokens=3"]
    first = call("generate", run_folder, "<u>hi<a>", *greedy).out.removeprefix("<u>hi<a>").removesuffix("\n")
    second = call("generate", run_folder, f"<u>hi<a>{first}<u>you<a>", *greedy).out
    assert turns[1] == first and f"<u>hi<a>{first}<u>you<a>{turns[3]}\n" == second


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["messages", "one text"])
def test_a_server_answers_as_the_folder_does(call, run_folder, with_template, template, monkeypatch):
    from tests.serve.conftest import serving

    if template is None:
        (with_template / "chat_template.jinja").unlink()
    greeting, lines = (TEXT, MESSAGES)[template is not None], ("/temp 0", "para", "ba", "/exit")
    with serving(with_template, MOEFORGE_API_KEYS="secret") as server:
        code, _, err = call("chat", server.url)
        assert code == 2 and "put it into MOEFORGE_API_KEY" in err
        monkeypatch.setenv("MOEFORGE_API_KEY", "secret")
        told = talk(call, server.url, *lines, greeting=greeting)
        assert told == talk(call, with_template, *lines, greeting=greeting)
        assert "served with --show-routing" in talk(call, server.url, "/experts on", "/exit", greeting=greeting)
        code, _, err = call("chat", server.url, "--weights=int4")
        assert code == 2 and "leave them out with a URL" in err


def test_a_server_that_is_not_there(call):
    code, _, err = call("chat", "http://127.0.0.1:9")
    assert code == 2 and "127.0.0.1:9/v1/models does not answer" in err


def test_a_turn_that_is_refused_was_not_said(call, with_template):
    told = talk(call, with_template, "/temp 0", "x" * 100, "hi", "/exit", greeting=MESSAGES).splitlines()
    alone = talk(call, with_template, "/temp 0", "hi", "/exit", greeting=MESSAGES).splitlines()
    assert "the context takes 64" in told[1] and told[-1] == alone[-1]


def test_experts_are_marked_on_request(call, run_folder):
    said = talk(call, run_folder, "/temp 0", "/experts on", "a", "/experts off", "/exit").splitlines()
    assert said[1] == "experts on" and said[2].count("[") == 3
    assert said[3].startswith("strongest of 4 experts in layer 1:")
    assert said[4] == "experts off"


def test_mistakes_do_not_end_the_session(call, run_folder):
    said = talk(call, run_folder, "/temp warm", "/foo", "a" * 100, "/temp -1", "/temp 0", "/exit")
    for message in ("not 'warm'", "'/foo' is no command", "of 64 has room for 62", "greater than or equal to 0"):
        assert message in said
    assert said.endswith("temperature 0\n")
