"""``moeforge chat``: write a document in turns with a model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.colours import Painter
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.generate import Sampling, Writer

HELP = """Base models know no questions and answers: what you type and what the model writes is one growing document.
A line is added just as it is; end it with \\ to add a line break. An empty line lets the model go on.
  /reset           start an empty document
  /temp X          temperature; 0 is greedy
  /experts on|off  mark each token by its strongest expert in the last layer with experts
  /help  /exit     (or Ctrl-D; Ctrl-C stops the model's turn; // begins a line with /)"""
COMMANDS = ("reset", "temp", "experts", "help", "exit")


def chat(
    model: Annotated[Path, typer.Argument(help="A model folder or a run folder.")],
    *,
    max_tokens: Annotated[int, typer.Option(help="Per turn.", min=1)] = 200,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0.8")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal text.", show_default="random")] = None,
    domain: Annotated[str | None, typer.Option(help="Of the text, for a model that routes by it.")] = None,
) -> None:
    """Write a document in turns with a model. Base models have no chat template, so nothing is put around your text."""
    from moeforge.cli.generate import read_sampling
    from moeforge.generate import Writer
    from moeforge.hub import load

    sampling = read_sampling({"max_tokens": max_tokens, "temperature": temperature, "seed": seed})
    session = Session(Writer(*load(model), domain=domain), sampling)
    print(HELP)
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
    """One conversation: a document, how it is sampled, and whether experts are shown."""

    def __init__(self, writer: "Writer", sampling: "Sampling") -> None:
        self.writer, self.sampling = writer, sampling
        self.painter: Painter | None = None

    def take(self, line: str) -> bool:
        """Does what one line asks; False ends the session. Raises UserError for what it cannot do."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].strip().partition(" ")[::2])
        text = line[1:] if line.startswith("//") else line
        self.writer.read(text.removesuffix("\\") + "\n" if text.endswith("\\") else text)
        self._reply()
        return True

    def _command(self, name: str, value: str) -> bool:
        from moeforge.config import nearest
        from moeforge.generate import Writer

        match name, value.strip():
            case "reset", "":
                self.writer = Writer(self.writer.model, self.writer.tokenizer, domain=self.writer.domain)
                print("the document is empty")
            case "temp", number:
                self.sampling = _warmer(self.sampling, number)
                print(f"temperature {self.sampling.temperature:g}")
            case "experts", ("on" | "off") as wanted:
                self.painter = Painter(self.writer.model) if wanted == "on" else None
                print(f"experts {wanted}")
            case "help", "":
                print(HELP)
            case "exit", "":
                return False
            case _:
                raise UserError(
                    f"'/{' '.join((name, value)).strip()}' is no command.{nearest(name, COMMANDS)} See /help"
                )
        return True

    def _reply(self) -> None:
        stop = None
        try:
            for step in self.writer.write(self.sampling):
                print(self.painter.paint(step.text, step.experts) if self.painter else step.text, end="", flush=True)
                stop = step.stop
        except KeyboardInterrupt:
            stop = None
        print()
        if self.painter:
            print(self.painter.legend())
        if stop == "context full":
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
