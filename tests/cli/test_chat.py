"""``moeforge chat`` with its input piped in."""

import pytest

from moeforge.cli.chat import HELP
from moeforge.errors import UserError


def talk(call, run_folder, *lines: str) -> str:
    """What is printed after the greeting."""
    code, out, err = call(
        "chat", run_folder, "--seed=1", "--max-tokens=3", stdin="".join(f"{line}\n" for line in lines)
    )
    assert (code, err) == (0, "")
    assert out.startswith(HELP)
    return out.removeprefix(HELP + "\n")


def test_the_end_of_input_and_exit_both_leave(call, run_folder):
    assert talk(call, run_folder) == "\n"
    assert talk(call, run_folder, "/exit", "never read") == ""


def test_turns_continue_one_document(call, run_folder):
    alone = call("generate", run_folder, "para", "--temperature=0", "--max-tokens=6").out
    turns = talk(call, run_folder, "/temp 0", "para", "", "/exit").splitlines()
    assert turns[0] == "temperature 0"
    assert "para" + "".join(turns[1:]) == alone.rstrip("\n")


def test_a_backslash_at_the_end_is_a_line_break_and_two_slashes_are_one(run_folder):
    from moeforge.cli.chat import Session
    from moeforge.generate import Sampling, Writer
    from moeforge.hub import load

    session = Session(Writer(*load(run_folder)), Sampling(temperature=0, max_tokens=1))
    before = session.writer.length
    assert session.take("//ab\\")
    # Three typed characters, a line break, and one token from the model.
    assert session.writer.length == before + 4 + 1
    with pytest.raises(UserError, match=r"'/rest' is no command\. Did you mean 'reset'\?"):
        session.take("/rest")
    assert session.take("/reset")
    assert session.writer.length == before


def test_experts_are_marked_on_request(call, run_folder):
    said = talk(call, run_folder, "/temp 0", "/experts on", "a", "/experts off", "/exit").splitlines()
    assert said[1] == "experts on" and said[2].count("[") == 3
    assert said[3].startswith("strongest of 4 experts in layer 1:")
    assert said[4] == "experts off"


def test_mistakes_do_not_end_the_session(call, run_folder):
    said = talk(call, run_folder, "/temp warm", "/foo", "a" * 100, "/temp -1", "/temp 0", "/exit")
    for message in ("not 'warm'", "'/foo' is no command", "has room for 62", "greater than or equal to 0"):
        assert message in said
    assert said.endswith("temperature 0\n")
