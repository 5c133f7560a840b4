"""The layer as a plain torch module in somebody else's model: a step of training, and its balance loss."""

import torch

from moeforge.moe import MoE, MoEConfig

torch.manual_seed(0)
config = MoEConfig.model_validate(
    {
        "experts": {"num_experts": 8, "d_expert": 64},
        "shared": {"d_expert": 64, "mix": "gated"},
        "router": {"select": {"type": "top_k", "k": 2}, "losses": [{"type": "load_balancing_loss", "weight": 0.01}]},
    }
)
layer = MoE(config, d_model=32)
x = torch.randn(4, 10, 32)
y, routing = layer(x)
balance = layer.router.balance_losses(routing, batch_size=4)["load_balancing_loss"]
loss = (y - x.roll(1, dims=1)).square().mean() + 0.01 * balance
loss.backward()
print(f"loss {loss.item():.3f}, balance {balance.item():.3f}, tokens per expert {routing.route.counts.tolist()}")
