"""One domain's own model out of a model that routes by domain: the experts it goes to, and nothing of the others."""

import torch

from moeforge.models.config import LayerConfig
from moeforge.models.decoder import Decoder
from moeforge.moe import Context, MoE, MoEConfig, Route, RouterConfig
from moeforge.moe.gates import Lookup
from moeforge.moe.scores import Logits
from moeforge.moe.select import TopK
from moeforge.moe.weigh import Scores


@torch.no_grad()
def extract(model: Decoder, domain: str) -> Decoder:
    """The sub-model with the same logits on text of ``domain`` (arXiv:2110.03742, section 4); it shares no memory.

    Layers that do not look the domain up stay whole. Raises ValueError for a domain that the model does not know, and
    for a layer in which more than the domain decides.
    """
    config = model.config
    if domain not in config.domains:
        raise ValueError(f"the model knows no domain '{domain}'; it knows {', '.join(config.domains) or 'none'}")
    layers, tensors = dict(config.layers), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index, layer in enumerate(config.all_layers):
        if layer.attention.router and getattr(layer.attention.router.gate, "by", "") == "domain":
            raise ValueError(f"layer {index}: its attention heads go by domain too, and only experts are taken out")
        if layer.moe is None or layer.moe.router.gate.type != "lookup" or layer.moe.router.gate.by != "domain":
            continue
        if not _domain_alone_decides(layer.moe):
            raise ValueError(
                f"layer {index}: more than the domain decides: it takes top_k of one bank, by domain alone"
            )
        route = _route(model.moe_layers[index], config.domains.index(domain))
        layers[index] = _small(layer, layer.moe, len(route.expert))
        prefix = f"blocks.{index}.moe."
        for name, _ in model.moe_layers[index].banks[0].named_parameters():
            tensors[f"{prefix}banks.0.{name}"] = tensors[f"{prefix}banks.0.{name}"][route.expert]
        tensors[f"{prefix}router.gate.table"] = route.weight[None]
        for name in ("expert_bias", "loss_scale"):
            tensors.pop(f"{prefix}router.{name}", None)
    small = Decoder(config.replace(layers=layers, domains=(domain,)))
    small.load_state_dict(tensors)
    return small.to(model.embedding.weight).train(model.training)


def _domain_alone_decides(moe: MoEConfig) -> bool:
    router, (bank, *others) = moe.router, moe.experts
    plain = (
        router.select.type == "top_k" and moe.heads == 1 and not (router.gate.rows or router.noise or router.capacity)
    )
    return plain and bank.type == "mlp" and not others


def _route(moe: MoE, domain: int) -> Route:
    """What one row of the domain gets outside training."""
    training = moe.training
    device = moe.router.gate.table.device
    row, ids = torch.zeros(1, moe.row_width, device=device), torch.tensor([domain], device=device)
    route = moe.eval().router(row, Context(ids={"domain": ids})).route
    moe.train(training)
    return route


def _small(layer: LayerConfig, moe: MoEConfig, num_experts: int) -> LayerConfig:
    """The layer with the domain's experts alone: its gate's one row of logits is their weights."""
    gate = Lookup(by="domain", num_ids=1)
    router = RouterConfig(gate=gate, score=Logits(), select=TopK(k=num_experts), weigh=Scores(), losses=())
    bank = moe.experts[0].replace(num_experts=num_experts)
    return layer.replace(moe=moe.replace(experts=(bank,), router=router))
