"""A domain's own model: the same logits, and nothing left of the experts that the domain does not use."""

from typing import Any

import pytest
import torch

from moeforge.models import Cache, Decoder, extract, measure
from tests.models.test_decoder import decoder, ids

NAMES = ("code", "law", "verse")
GATE = {"type": "lookup", "by": "domain", "num_ids": 4}


def by_domain(shared: Any = None, changes: dict[str, Any] | None = None, **router: Any) -> Decoder:
    moe = {"experts": {"num_experts": 6, "d_expert": 8}, "router": {"gate": GATE, **router}, "shared": shared}
    return decoder(moe=moe, domains=NAMES, **(changes or {})).eval()


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"score": "sigmoid", "weigh": {"normalize_weights": True}, "controller": "expert_bias"},
    "after": {"score": "logits", "weigh": "softmax", "select": {"k": 3}},
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repeated": {"num_layers": 2, "num_repeats": 2},
    "biased": {"layers": {1: {"moe": {"experts": {"bias": True, "clamp": {"limit": 0.5}}}}}},
    "mixed": {"layers": {1: {"moe": {"router": {"gate": "linear"}}}}, "first_dense_layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_the_extracted_model_has_the_same_logits(router: str, shape: str) -> None:
    model, input_ids = by_domain({"d_expert": 4}, SHAPES[shape], **ROUTERS[router]), ids()
    for moe in model.moe_layers.values():
        if moe.router.expert_bias is not None:
            moe.router.expert_bias.normal_()
        for name, weight in moe.banks.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    for number, name in enumerate(NAMES):
        whole = model(input_ids, known={"domain": torch.full_like(input_ids, number)}).logits
        small, known = extract(model, name), {"domain": torch.zeros_like(input_ids)}
        torch.testing.assert_close(small(input_ids, known=known).logits, whole, rtol=1e-4, atol=1e-4)
        cache = Cache(small, 2, 9)
        parts = zip(input_ids.split([4, 5], 1), known["domain"].split([4, 5], 1), strict=True)
        decoded = torch.cat([small(part, cache=cache, known={"domain": one}).logits for part, one in parts], 1)
        torch.testing.assert_close(decoded, whole, rtol=1e-4, atol=1e-4)


def test_the_extracted_model_is_as_small_as_what_one_token_uses() -> None:
    model = by_domain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = extract(model, "law")
    assert small.config.domains == ("law",)
    left, whole = measure(small.config), measure(model.config)
    tables = 3 * (6 - 2)  # columns of other experts
    assert left.total.all == left.active.all == whole.active.all - tables
    assert left.flops_per_token == whole.flops_per_token
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "router",
    [
        {"gate": GATE | {"rows": True}},
        {"select": "random"},
        {"noise": ["gumbel"]},
        {"select": "auxiliary"},
        {"capacity": [{"type": "capacity"}]},
    ],
    ids=str,
)
def test_layers_in_which_more_decides_are_refused(router: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer 0: more than the domain decides"):
        extract(by_domain(**router), "code")


def test_heads_that_go_by_domain_are_refused() -> None:
    attention = {"type": "routed", "num_experts": 4, "router": {"gate": GATE, "losses": []}}
    with pytest.raises(ValueError, match="layer 0: its attention heads go by domain too"):
        extract(decoder("dense", attention=attention, domains=("code", "law", "verse")), "code")


def test_only_what_the_model_knows_can_be_taken_out() -> None:
    with pytest.raises(ValueError, match="no domain 'prose'; it knows code, law, verse"):
        extract(by_domain(), "prose")
    with pytest.raises(ValueError, match="no domain 'code'; it knows none"):
        extract(decoder(), "code")
