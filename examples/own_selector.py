"""A routing idea of your own in a slot, without touching moeforge: every expert that scores above a threshold."""

from typing import Literal

import torch
from torch import Tensor

from moeforge.moe import Context, MoE, MoEConfig
from moeforge.moe.select import Selection, Selector


class AboveMean(Selector):
    """Experts whose score is ``margin`` times the mean or more: as many as a token deserves, perhaps none."""

    type: Literal["own_selector:AboveMean"] = "own_selector:AboveMean"
    margin: float = 1.5

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def mean_experts(self, num_experts: int) -> float:
        """A guess, for counting active parameters before there is a model."""
        return num_experts / 4

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] scores -> a mask."""
        return Selection(mask=scores_TE >= self.margin * scores_TE.mean(-1, keepdim=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    select = {"type": "own_selector:AboveMean", "margin": 1.2}
    tree = {"experts": {"num_experts": 8, "d_expert": 64}, "router": {"select": select}}
    layer = MoE(MoEConfig.model_validate(tree), d_model=32)
    y, routing = layer(torch.randn(1, 12, 32))
    print("experts per token:", torch.bincount(routing.route.token, minlength=12).tolist())
