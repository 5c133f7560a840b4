"""``moeforge doctor``: what this machine offers, what works on it, and why."""

import json
from typing import Annotated

import typer


def doctor(
    *, as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False
) -> None:
    """Check Python, torch, devices and memory, and really run every engine forward and backward."""
    from moeforge.cli.checkup import checkup

    found = checkup()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for section, facts in found.items():
        print(section)
        for name, fact in facts.items():
            print(f"  {name:<22} {fact}")
