"""What a person sees while a run trains: a bar in a terminal, a line now and then elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from moeforge.train.metrics import Line

PLAIN_EVERY = 20
"""Steps between lines where there is no terminal."""


class Display:
    """Shows loss, bits per byte, speed, load entropy and dead experts; ``quiet`` shows nothing."""

    def __init__(self, name: str, steps: int, done: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        columns = (
            "{task.description}",
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[note]}",
        )
        shown = [TextColumn(column) if isinstance(column, str) else column for column in columns]
        self.bar = Bar(*shown, console=self.console, disable=quiet or not self.console.is_terminal)
        self.task = self.bar.add_task(name, total=steps, completed=done, note="")
        self.name, self.steps, self.bits = name, steps, ""

    def update(self, line: Line) -> None:
        """After each step."""
        if "eval/bits_per_byte" in line:
            self.bits = f"  {line['eval/bits_per_byte']:.3f} bits/byte"
        note = f"loss {line['loss/lm']:.3f}{self.bits}  {line['perf/tokens_per_second']:,.0f} tok/s{_load(line)}"
        self.bar.update(self.task, completed=line["step"], note=note)
        due = line["step"] % PLAIN_EVERY == 0 or line["step"] == self.steps or "eval/bits_per_byte" in line
        if due and not self.console.is_terminal:
            self.console.print(f"{self.name} {line['step']}/{self.steps}  {note}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()


def _load(line: Line) -> str:
    """The least even layer, and how many experts got nothing."""
    entropies = [value for name, value in line.items() if name.startswith("moe/load_entropy/")]
    if not entropies:
        return ""
    dead = sum(value for name, value in line.items() if name.startswith("moe/dead_experts/"))
    return f"  load entropy {min(entropies):.2f}" + (f"  dead experts {dead}" if dead else "")
