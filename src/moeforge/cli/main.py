"""``moeforge VERB ...``: finds the verb's file, and turns what a user can mend into one line and exit code 2."""

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated

import typer

from moeforge import __version__
from moeforge.cli.settings import Adjustable
from moeforge.errors import UserError

VERBS = (
    "train",
    "generate",
    "chat",
    "serve",
    "evaluate",
    "analyze",
    "compress",
    "inspect",
    "convert",
    "recipes",
    "reproduce",
    "compare",
    "plan",
    "doctor",
    "demo",
    "bench",
)
"""Each is a module beside this one that holds a function, or a group of them, of the same name."""
TAKE_SETTINGS = ("train", "evaluate", "compress", "inspect", "reproduce", "compare", "plan")
"""These accept ``--dotted.name=value`` besides their own options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _app(given[:1] if given and given[0] in VERBS else VERBS)(given, prog_name="moeforge")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _app(verbs: Iterable[str]) -> typer.Typer:
    """The program with these verbs; the others' files are not even read."""
    # Plain help: rich would be half of the time that --help takes.
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_program)
    for verb in verbs:
        command = getattr(import_module(f"moeforge.cli.{verb}"), verb)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=verb)
        elif verb in TAKE_SETTINGS:
            app.command(verb, cls=Adjustable)(command)
        else:
            app.command(verb)(command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Build, train, look inside and run Mixture-of-Experts models."""
