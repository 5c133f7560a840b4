"""``moeforge chat``: talk with a model, in this process or behind a URL."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.colours import Painter
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.cli.talk import Talk
    from moeforge.generate import Sampling

TEXT = """This model knows no questions and answers: what you type and what the model writes is one growing text.
A line is added just as it is; end it with \\ to add a line break. An empty line lets the model go on.
"""
MESSAGES = """Your lines go to the model as messages, through its chat template.
"""
HELP = """  /reset           start anew
  /temp X          temperature; 0 is greedy
  /experts on|off  mark each token by its strongest expert in the last layer with experts
  /help  /exit     (or Ctrl-D; Ctrl-C stops the model's turn; // begins a line with /)"""
COMMANDS = ("reset", "temp", "experts", "help", "exit")


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder, or the URL of a server (OpenAI API).")],
    *,
    max_tokens: Annotated[int, typer.Option(help="Per turn.", min=1)] = 200,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0.8")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal text.", show_default="random")] = None,
    weights: Annotated[str | None, typer.Option(help="As in generate.", show_default="as stored")] = None,
    domain: Annotated[str | None, typer.Option(help="Of the text, for a model that routes by it.")] = None,
) -> None:
    """Talk with a model: as messages where it has a chat template, else in turns of one text.

    A server that wants an API key gets MOEFORGE_API_KEY.
    """
    from moeforge.cli.generate import read_sampling
    from moeforge.cli.talk import open_remote, open_talks
    from moeforge.config import build
    from moeforge.generate import ALONE, Settings, open_engine

    sampling = read_sampling({"max_tokens": max_tokens, "temperature": temperature, "seed": seed})
    with ExitStack() as closing:
        if model.startswith(("http://", "https://")):
            if (weights, domain) != (None, None):
                raise UserError("--weights and --domain are the server's to choose: leave them out with a URL")
            session = Session(open_remote(model, os.environ.get("MOEFORGE_API_KEY")), sampling)
        else:
            held = build(Settings, ALONE.model_dump() | {"weights": weights or "as stored"}, source="chat")
            engine = closing.enter_context(open_engine(model, held, domain=domain))
            session = Session(open_talks(engine, Path(model)), sampling, engine.runner.experts)
        print(session.help)
        _turns(session)


def _turns(session: "Session") -> None:
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if not session.take(line):
                return
        except UserError as error:
            print(error)


class Session:
    """One conversation, how it is sampled, and whether experts are shown."""

    def __init__(
        self, start: "Callable[[], Talk]", sampling: "Sampling", experts: dict[int, int] | None = None
    ) -> None:
        """``experts``: how many each layer has; None where they cannot be seen."""
        self.start, self.sampling, self.experts = start, sampling, experts
        self.talk = start()
        self.painter: Painter | None = None

    @property
    def help(self) -> str:
        """What may be typed."""
        return (MESSAGES if self.talk.messages else TEXT) + HELP

    def take(self, line: str) -> bool:
        """Does what one line asks; False ends the session. Raises UserError for what it cannot do."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].strip().partition(" ")[::2])
        text = line[1:] if line.startswith("//") else line
        self.talk.say(text.removesuffix("\\") + "\n" if text.endswith("\\") else text)
        self._reply()
        return True

    def _command(self, name: str, value: str) -> bool:
        from moeforge.config import nearest

        match name, value.strip():
            case "reset", "":
                self.talk = self.start()
                print("nothing is said yet")
            case "temp", number:
                self.sampling = _warmer(self.sampling, number)
                print(f"temperature {self.sampling.temperature:g}")
            case "experts", ("on" | "off") as wanted:
                self.painter = self._new_painter() if wanted == "on" else None
                print(f"experts {wanted}")
            case "help", "":
                print(self.help)
            case "exit", "":
                return False
            case _:
                raise UserError(
                    f"'/{' '.join((name, value)).strip()}' is no command.{nearest(name, COMMANDS)} See /help"
                )
        return True

    def _new_painter(self) -> Painter:
        if self.experts is None:
            raise UserError("experts are seen where the model runs: open its page, served with --show-routing")
        return Painter(self.experts)

    def _reply(self) -> None:
        from moeforge.cli.generate import emit

        painter = self.painter
        try:
            for word, experts in self.talk.answer(self.sampling, painter is not None):
                emit(painter.paint(word, experts) if painter else word)
        except KeyboardInterrupt:
            pass
        print()
        if painter:
            print(painter.legend())
        if self.talk.full:
            print("(the context is full: /reset starts anew)")
        if self.sampling.seed is not None:  # another turn, other numbers, and still the same in every session
            self.sampling = self.sampling.replace(seed=(self.sampling.seed + 1) % 2**63)


def _warmer(sampling: "Sampling", text: str) -> "Sampling":
    from moeforge.cli.generate import read_sampling

    try:
        asked = {**sampling.model_dump(), "temperature": float(text)}
    except ValueError as error:
        raise UserError(f"/temp wants a number, such as /temp 0.8, not '{text}'") from error
    return read_sampling(asked)
