"""Settings on the command line: ``--dotted.name=value`` or ``--dotted.name value``, before or after the rest."""

from collections.abc import Collection
from typing import Any

from typer.core import TyperCommand

from moeforge.errors import UserError


class Adjustable(TyperCommand):
    """A command for which every long option that it does not know is a setting; ``context.obj`` has the list."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes the settings out, then parses what is left. Raises UserError for a setting without a value."""
        own = {name for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
        rest, ctx.obj = split_settings(args, own)
        return super().parse_args(ctx, rest)


def split_settings(arguments: list[str], own: Collection[str]) -> tuple[list[str], list[str]]:
    """(arguments for the command, settings as ``--name=value``). ``own`` are the command's own options."""
    rest: list[str] = []
    settings: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, _ = argument.partition("=")
        if argument == "--":
            return [*rest, argument, *queue], settings
        if not name.startswith("--") or name in own:
            rest.append(argument)
        elif equals:
            settings.append(argument)
        elif queue and not queue[0].startswith("--"):
            settings.append(f"{name}={queue.pop(0)}")
        else:
            raise UserError(_without_value(name, own))
    return rest, settings


def _without_value(name: str, own: Collection[str]) -> str:
    from moeforge.config import nearest

    return f"{name} is no option of this command, and a setting needs a value: {name}=VALUE.{nearest(name, own)}"
