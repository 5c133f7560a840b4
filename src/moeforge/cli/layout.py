"""Options about how processes share the work that ``train`` and ``plan`` both have."""

from typing import Annotated

import typer

Tp = Annotated[int, typer.Option(min=1, help="Processes that hold slices of the same matrices.")]
TwoLevel = Annotated[bool, typer.Option("--two-level", help="Rows go to other machines by a neighbour.")]
Fetch = Annotated[bool, typer.Option("--fetch", help="Send weights of needed experts, not rows.")]
ByIndex = Annotated[bool, typer.Option("--by-index", help="Send rows to all; each picks those of its experts.")]
Uneven = Annotated[bool, typer.Option("--uneven", help="Shares of experts may differ by one.")]
Offload = Annotated[bool, typer.Option("--offload", help="With --shard: weights and optimizer in the host's memory.")]
Placement = Annotated[str | None, typer.Option(metavar="FILE", help="YAML: who holds which experts.")]
