"""The decoder's settings: layers, patterns, round trips and mistakes."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moeforge.config import build, to_yaml
from moeforge.errors import UserError
from moeforge.models import LayerConfig, ModelConfig
from moeforge.models.config import FanIn, Normal
from moeforge.moe import MLPExperts, MoEConfig, RouterConfig
from moeforge.moe.scores import Sigmoid
from moeforge.moe.select import TopK

BANK = {"num_experts": 8, "d_expert": 16}
MOE = {"experts": BANK}
PREVIOUS = {"type": "linear", "previous": True}


def experts_per_layer(config: ModelConfig) -> list[int]:
    return [layer.moe.num_experts if layer.moe else 0 for layer in config.all_layers]


def test_a_layer_changes_only_what_it_names() -> None:
    moe = MOE | {"router": {"score": "sigmoid", "select": {"type": "top_k", "k": 3}}, "shared": {"d_expert": 4}}
    change = {"experts": {"num_experts": 32}, "router": {"select": {"k": 1}}}
    config = build(ModelConfig, {"moe": moe, "d_ff": 99, "layers": {1: {"moe": change}, 2: {"moe": None}}})
    assert experts_per_layer(config) == [8, 32, 0, 8]
    layer = config.all_layers[1]
    assert layer.moe is not None and layer.moe.shared is not None and layer.d_ff == 99
    assert layer.moe.experts[0] == MLPExperts(num_experts=32, d_expert=16)
    assert layer.moe.router == RouterConfig(score=Sigmoid(), select=TopK(k=1))


def test_layers_and_defaults_may_be_configs() -> None:
    moe = MoEConfig(experts=(MLPExperts(num_experts=4, d_expert=8),), router=RouterConfig(score=Sigmoid()))
    config = ModelConfig(moe=moe, layers={1: LayerConfig(d_ff=7), 2: LayerConfig(moe=None)})
    assert experts_per_layer(config) == [4, 4, 0, 4] and config.all_layers[1].d_ff == 7
    assert config.all_layers[1].moe == moe
    assert config.replace(d_model=128).all_layers == config.all_layers


@pytest.mark.parametrize(
    ("first", "every", "expected"),
    [(0, 1, [8, 8, 8, 8]), (1, 1, [0, 8, 8, 8]), (0, 2, [0, 8, 0, 8]), (1, 3, [0, 0, 0, 8]), (2, 2, [0, 0, 0, 8])],
)
def test_patterns(first: int, every: int, expected: list[int]) -> None:
    config = build(ModelConfig, {"moe": MOE, "first_dense_layers": first, "moe_every": every})
    assert experts_per_layer(config) == expected


def test_a_dense_layer_of_a_pattern_stays_dense_unless_it_names_experts() -> None:
    layers = {0: {"d_ff": 7}, 1: {"moe": {"experts": {"num_experts": 2}}}}
    config = build(ModelConfig, {"moe": MOE, "first_dense_layers": 2, "layers": layers})
    assert experts_per_layer(config) == [0, 2, 8, 8] and config.all_layers[0].d_ff == 7
    layers[1] = {"moe": MOE}
    same = build(ModelConfig, {"moe": MOE, "first_dense_layers": 2, "layers": layers})
    assert experts_per_layer(build(ModelConfig, yaml.safe_load(to_yaml(same)))) == [0, 8, 8, 8]


def test_pyramid_and_residual() -> None:
    shared = {"d_expert": 16, "mix": "coefficient"}
    router = {"select": {"type": "top_k", "k": 1}}
    layers = {index: {"moe": {"experts": {"num_experts": 8 * 2**index}}} for index in (1, 2)}
    tree = {"num_layers": 3, "moe": MOE | {"router": router, "shared": shared}, "layers": layers}
    config = build(ModelConfig, tree)
    assert experts_per_layer(config) == [8, 16, 32]
    assert all(layer.moe and layer.moe.shared == config.moe.shared for layer in config.all_layers if config.moe)
    assert yaml.safe_load(to_yaml(config))["layers"] == layers


def bank_trees() -> st.SearchStrategy[Any]:
    one = st.fixed_dictionaries({"num_experts": st.integers(2, 9), "d_expert": st.integers(1, 9)})
    return one | st.lists(one, min_size=1, max_size=2)


def moe_trees() -> st.SearchStrategy[Any]:
    router = st.fixed_dictionaries(
        {},
        optional={
            "score": st.sampled_from(["softmax", "sigmoid", "logits"]),
            "weigh": st.sampled_from(["scores", {"type": "softmax", "weight_scale": 2.0}]),
            "losses": st.just([]) | st.just(["z_loss"]),
            "controller": st.just("expert_bias"),
        },
    )
    shared = st.fixed_dictionaries({"d_expert": st.integers(1, 9), "mix": st.sampled_from(["sum", "coefficient"])})
    return st.fixed_dictionaries({"experts": bank_trees()}, optional={"router": router, "shared": shared})


def model_trees() -> st.SearchStrategy[Any]:
    layer = st.fixed_dictionaries(
        {}, optional={"d_ff": st.integers(1, 9), "moe": st.none() | moe_trees(), "attends": st.booleans()}
    )
    return st.fixed_dictionaries(
        {"moe": moe_trees(), "num_layers": st.just(5)},
        optional={
            "layers": st.dictionaries(st.integers(0, 3), layer, max_size=3),
            "first_dense_layers": st.integers(0, 2),
            "moe_every": st.integers(1, 2),
            "norm_eps": st.sampled_from([1e-6, 1e-5]),
            "init": st.sampled_from(["normal", "fan_in", {"type": "normal", "std": 0.006}]),
            "tie_embeddings": st.booleans(),
            "num_repeats": st.integers(1, 3),
            "momentum": st.fixed_dictionaries({"decay": st.floats(0, 0.9)}, optional={"second": st.just(0.9)}),
        },
    )


@given(model_trees())
def test_yaml_round_trip(tree: dict[str, Any]) -> None:
    try:
        config = build(ModelConfig, tree)
    except UserError as error:  # a drawn layer may have fewer experts than top_k, or none anywhere
        assert "no layer has experts" in str(error)
        return
    again = build(ModelConfig, yaml.safe_load(to_yaml(config)))
    assert again == config and again.all_layers == config.all_layers
    assert to_yaml(again) == to_yaml(config)


def test_the_short_form_of_a_slot_is_its_default_member() -> None:
    assert build(ModelConfig, {"init": "fan_in"}).init == FanIn() and ModelConfig().init == Normal()


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"d_model": 60, "num_heads": 8}, "d_model = 60 is not divisible by num_heads = 8"),
        ({"d_model": 20, "num_heads": 4}, "head_dim = 5 is odd; rotary positions need pairs"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads = 4 is not divisible by num_kv_heads = 3"),
        ({"layers": {4: {"d_ff": 8}}}, "layers names layer 4, but num_layers = 4 (numbered from 0)"),
        ({"moe": MOE, "first_dense_layers": 4}, "moe is set but no layer has experts"),
        ({"moe": {"experts": {**BANK, "num_experts": 1}}}, "moe: top_k = select.k = 2 is more than num_experts = 1"),
        ({"d_modle": 64}, "d_modle is not a setting. Did you mean 'd_model'?"),
        (
            {"moe": {"experts": {"num_experts": 4, "dexpert": 3, "d_expert": 2}}},
            "dexpert is not a setting. Did you mean",
        ),
        ({"moe": {"experts": {"num_experts": 4}}, "layers": {0: {"d_ff": 3}}}, "moe.experts.d_expert is missing"),
        (
            {"moe": MOE | {"router": {"select": "topk"}}},
            "moe.router.select: there is no type 'topk'. Did you mean 'top_k'",
        ),
        ({"moe": MOE | {"router": {"losses": ["zloss"]}}}, "there is no type 'zloss'. Did you mean 'z_loss'?"),
        (
            {"moe": MOE | {"router": {"gate": PREVIOUS}}, "layers": {2: {"moe": {"experts": {"num_experts": 4}}}}},
            "layer 2: its gate takes a state of 4, the layer below hands on 8",
        ),
        ({"moe": MOE | {"router": {"gate": {"type": "lookup", "num_ids": 9}}}}, "a decoder knows token and domain ids"),
        (
            {"vocab_size": 11, "moe": MOE | {"router": {"gate": {"type": "lookup", "by": "token", "num_ids": 9}}}},
            "gate.num_ids = 9 is less than 11 tokens",
        ),
        ({"momentum": {"decay": 0.5}}, "momentum acts on what experts add, and no layer has experts"),
        ({"attends": False}, "attends is false in every layer: no token would see another"),
        (
            {"moe": MOE, "layers": {1: {"attends": False, "moe": {"shortcut": True}}}},
            "layers.1: moe.shortcut leads past the layer's attention",
        ),
        (
            {"moe": MOE | {"router": {"select": "by_importance"}}, "layers": {1: {"attends": False}}},
            "layers.1: select: by_importance reads attention, and attends: false leaves that out",
        ),
        (
            {
                "moe": MOE | {"router": {"gate": PREVIOUS}},
                "num_layers": 2,
                "num_repeats": 2,
                "layers": {1: {"moe": {"experts": {"num_experts": 4}}}},
            },
            "layer 1: its gate takes a state of 4, the layer below hands on 8",
        ),
        (
            {
                "domains": ["a", "b"],
                "moe": MOE | {"router": {"gate": {"type": "lookup", "by": "domain", "num_ids": 1}}},
            },
            "layer 0: gate.num_ids = 1 is less than 2 domains",
        ),
        ({"domains": ["a", "b"], "moe": MOE}, "domains has names, but no gate looks domains up"),
        ({"layers": {"one": {}}}, "input should be a valid integer"),
        ({"moe": MOE, "moe_every": "x", "layers": {1: {}}}, "moe_every = 'x': input should be a valid integer"),
    ],
)
def test_a_mistake_is_one_line(tree: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        build(ModelConfig, tree)
    assert line in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_all_mistakes_at_once_and_none_twice() -> None:
    layers = {1: {"d_ff": 0}, 2: {"moe": {"experts": {"num_experts": 0}}}, 3: {"d_ff": -1}}
    moe = {"experts": {"num_experts": 4, "d_expert": 0}, "shared": {"d_expert": 0}}
    with pytest.raises(UserError) as caught:
        build(ModelConfig, {"d_ff": -1, "moe": moe, "layers": layers, "d_expert": 0})
    named = [line.split(" ")[2] for line in str(caught.value).splitlines()[1:]]
    places = ["d_ff", "moe.experts.d_expert", "moe.shared.d_expert", "d_expert"]
    assert sorted(named) == sorted([*places, "layers.1.d_ff", "layers.2.moe.experts.num_experts"])
