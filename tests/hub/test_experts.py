"""One picture of the experts of any model: its matrices compute what the model computes, its names are the file's."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import moeforge
from moeforge.errors import UserError
from moeforge.kernels.activation import activate
from moeforge.models import Decoder, ModelConfig
from moeforge.moe import Route


def decoder(moe: object) -> Decoder:
    settings = {"vocab_size": 32, "d_model": 16, "num_layers": 3, "num_heads": 2, "moe": moe, "first_dense_layers": 1}
    return Decoder(ModelConfig.model_validate(settings))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_our_own_models(activation, bias):
    bank = {"num_experts": 3, "d_expert": 8, "activation": activation, "bias": bias}
    model = decoder({"experts": [bank, {"type": "copy"}], "shared": {"d_expert": 8}})
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    first, second = moeforge.experts(model)
    assert (first.name, first.layer, second.layer, first.num_experts) == ("blocks.1.moe", 1, 2, 4)
    moe = model.blocks[1].moe
    assert first.router is moe.router and first.shared is moe.shared
    stack, copies = first.stacks
    assert (stack.module, copies.module) == tuple(moe.banks)
    assert (stack.kind, copies.kind, copies.up, copies.on_disk) == ("mlp", "copy", None, {})
    assert (stack.gate is None) == (activation == "relu") and (stack.down_bias is None) != bias
    x = torch.randn(1, 16)
    for expert in range(3):

        def through(matrix, bias, x=x, expert=expert):
            return F.linear(x, matrix[expert], None if bias is None else bias[expert])

        up = through(stack.up, stack.up_bias)
        joined = up if stack.gate is None else torch.cat([through(stack.gate, stack.gate_bias), up], -1)
        route = Route.from_top_k(torch.tensor([[expert]]), torch.ones(1, 1), 3)
        expected = through(stack.down, stack.down_bias, activate(joined, activation))
        torch.testing.assert_close(moe.banks[0](x, route), expected)
    saved = model.state_dict().keys()
    assert stack.on_disk == {name: (name,) for name in saved if name.startswith("blocks.1.moe.banks.0.")}


def test_models_without_experts_are_refused():
    with pytest.raises(UserError, match="no layer with experts"):
        moeforge.experts(decoder(None))
    with pytest.raises(UserError, match=r"\(a Linear\) has no experts"):
        moeforge.experts(nn.Linear(2, 2))


def test_what_is_written_into_the_picture_is_written_into_the_model():
    model = decoder({"experts": {"num_experts": 2, "d_expert": 8}})
    moeforge.experts(model)[0].stacks[0].up[1] = 7
    assert (model.blocks[1].moe.banks[0].gate_up_proj[1, 8:] == 7).all()
    assert (model.blocks[1].moe.banks[0].gate_up_proj[1, :8] != 7).all()


@pytest.fixture(scope="session")
def families():
    """The table of families; a test that asks for it is skipped where there is no transformers."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'moeforge[hf]'")
    return pytest.importorskip("tests.hub.families")


def test_the_matrices_of_every_family_compute_its_experts(families):
    for family in families.FAMILIES:
        model = families.build(family)
        model.set_experts_implementation("eager")
        for layer in moeforge.experts(model):
            (stack,) = layer.stacks
            assert layer.num_experts == stack.num_experts == len(stack.down) == 6
            module = stack.module
            x, expert = torch.randn(1, stack.up.shape[2]), layer.layer + 3
            z = [
                F.linear(x, matrix[expert], None if bias is None else bias[expert])
                for matrix, bias in ((stack.gate, stack.gate_bias), (stack.up, stack.up_bias))
                if matrix is not None
            ]
            joined = torch.cat(z, -1) if module.is_concatenated else torch.stack(z, -1).flatten(1)
            hidden = module._apply_gate(joined) if len(z) == 2 else module.act_fn(joined)
            y = F.linear(hidden, stack.down[expert], None if stack.down_bias is None else stack.down_bias[expert])
            y = module.post_expert_norm(y) if module.has_post_expert_norm else y
            want = module(x, torch.tensor([[expert]]), torch.ones(1, 1))
            torch.testing.assert_close(y, want, msg=lambda text, family=family: f"{family}: {text}")


def test_the_names_of_every_family_are_those_in_the_file(families, tmp_path):
    for family in families.FAMILIES:
        model = families.build(family)
        model.save_pretrained(tmp_path / family)
        with safe_open(tmp_path / family / "model.safetensors", framework="pt") as file:
            size = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - no mapping
        for layer in moeforge.experts(model):
            for parameter, names in layer.stacks[0].on_disk.items():
                assert sum(size[name] for name in names) == model.get_parameter(parameter).numel(), (family, parameter)


def test_a_family_looks_the_same_through_both_doors(families, tmp_path):
    for family in families.NATIVE.keys() - families.DENSE.keys():
        theirs = families.build(family)
        theirs.save_pretrained(tmp_path / family)
        both = moeforge.experts(theirs), moeforge.experts(moeforge.load(tmp_path / family))
        for one, other in zip(*both, strict=True):
            assert (one.layer, one.num_experts) == (other.layer, other.num_experts), family
            assert (one.shared is None) == (other.shared is None), family
            (left,), (right,) = one.stacks, other.stacks
            names = [sorted(map(sorted, stack.on_disk.values())) for stack in (left, right)]
            assert names[0] == names[1], family
            for matrix in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
                same, here = getattr(left, matrix), getattr(right, matrix)
                assert (same is None and here is None) or torch.equal(same, here), (family, matrix)


def test_tensors_that_hold_two_stacks_are_not_named(families):
    import transformers

    config = transformers.Ernie4_5_VLMoeConfig(
        text_config={"num_hidden_layers": 2, "moe_num_experts": 6}, vision_config={"depth": 1}
    )
    with torch.device("meta"):
        text, vision = moeforge.experts(transformers.Ernie4_5_VLMoeForConditionalGeneration(config))
    assert (text.layer, vision.layer, vision.name) == (1, 1, "model.language_model.layers.1.mlp.vision_moe")
    assert text.shared is vision.shared is not None and text.router is not vision.router
    assert {*vision.stacks[0].on_disk.values()} == {()}


def test_router_and_shared_branch_of_every_family_are_found(families):
    for family in families.FAMILIES:
        with torch.device("meta"):
            model = families.make(*families.FAMILIES[family])
        for layer in moeforge.experts(model):
            routers = {id(weight) for weight in layer.router.parameters()}
            outputs = [len(weight) for weight in layer.router.parameters() if weight.ndim == 2]
            assert any(6 <= size <= 8 for size in outputs), f"{family}: six experts, and what a router counts as one"
            own = {id(weight) for weight in layer.shared.parameters()} if layer.shared else set()
            block = model.get_submodule(layer.name[: layer.name.index(f".{layer.layer}") + 2])
            branch = {
                id(w) for name, w in block.named_parameters() if "shared" in name and "shared_expert_gate" not in name
            }
            assert branch <= own and not own & routers, family
