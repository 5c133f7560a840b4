"""What a unit of load costs on each expert: its work, a measured latency, or what a paper charges for a kind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

if TYPE_CHECKING:
    from moeforge.moe.router import Routing

Prices = Literal["cost"] | tuple[Annotated[float, Field(ge=0)], ...] | None
"""One number per expert; ``cost``: its work over the mean work; null: all alike."""


def check_prices(prices: Prices, costs: Sequence[int]) -> None:
    """Raises ValueError unless there is a price for each of the experts, not all the same."""
    if prices is None:
        return
    if prices != "cost" and len(prices) != len(costs):
        raise ValueError(f"losses: {len(prices)} prices for {len(costs)} experts")
    if len(set(costs if prices == "cost" else prices)) == 1:
        raise ValueError("losses: prices do nothing where all experts cost the same")


def priced(load: Tensor, prices: Prices, routing: "Routing") -> Tensor:
    """[..., E] loads times the price of each expert."""
    if prices is None:
        return load
    if prices != "cost":
        return load * load.new_tensor(prices)
    cost_E = load.new_tensor(routing.cost)
    return load * cost_E / cost_E.mean()
