"""Models of transformers on our engines: the same logits and gradients as its own, family by family."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeforge
from moeforge.errors import UserError
from moeforge.hub.bridge import REFUSED
from moeforge.hub.interface import experts_forward, is_experts, kernel_activation

transformers = pytest.importorskip("transformers", reason="the bridge needs transformers: pip install 'moeforge[hf]'")
families = pytest.importorskip("tests.hub.families")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_gives_its_own_logits_and_gradients(family):
    model = families.build(family)
    want, want_gradients = families.run(model, "eager", IDS)
    assert moeforge.bridge(model) is model
    got, gradients = families.run(model, "moeforge", IDS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert gradients.keys() == want_gradients.keys()
    scale = {name: max(1.0, float(gradient.abs().max())) for name, gradient in want_gradients.items()}
    off = {
        name: float((gradients[name] - gradient).abs().max()) / scale[name] for name, gradient in want_gradients.items()
    }
    assert {name: far for name, far in off.items() if not far < 1e-3} == {}
    learning = [name for name, gradient in gradients.items() if "experts" in name and gradient.abs().max() > 0.1]
    assert learning, "experts that hardly matter prove nothing"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_loop_is_for_those_that_the_kernels_cannot_do(family):
    with torch.device("meta"):
        model = families.make(*families.FAMILIES[family])
    looped = {kernel_activation(module) is None for module in model.modules() if is_experts(module)}
    assert looped == {family in families.LOOPED}


def test_every_family_with_the_interface_is_tested():
    assert families.declared() == families.FAMILIES.keys()
    assert len(families.FAMILIES) >= 25


def test_the_page_names_the_families():
    page = (Path(__file__).parents[2] / "docs" / "bridge.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w-]+)`", page[page.index("These are") : page.index("`torch.compile` of a bridged")])
    assert set(named) == families.LOOPED | REFUSED.keys()
    assert f"{len(families.FAMILIES)} in transformers" in page


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_without_the_interface_is_refused_by_name(model_type):
    with torch.device("meta"):
        model = families.make(*families.UNFIT[model_type])
    with pytest.raises(UserError, match=f"^{model_type} does not use the experts interface of transformers: "):
        moeforge.bridge(model)
    with pytest.raises(UserError, match=f"^{model_type} does not"):
        moeforge.experts(model)


def test_a_dense_model_and_quantised_experts_are_refused():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"model_type llama.* has no experts"):
            moeforge.bridge(families.make("LlamaForCausalLM", {}))
        model = families.make(*families.FAMILIES["mixtral"])
    model.model.layers[1].mlp.experts.to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts holds torch\.float8_e4m3fn"):
        moeforge.bridge(model)
    assert model.get_experts_implementation()[""] != "moeforge"


def test_a_model_that_transformers_does_not_switch_is_refused():
    model = families.build("mixtral")
    model.model.layers[1].mlp.experts.config = transformers.MixtralConfig(experts_implementation="eager")
    before = model.get_experts_implementation()
    with pytest.raises(UserError, match=r"did not switch model\.layers\.1\.mlp\.experts"):
        moeforge.bridge(model)
    assert model.get_experts_implementation() == before != {"": "moeforge"}


def test_a_language_model_inside_another_model_is_switched():
    text = families.TINY | {"rope_parameters": families.ROPE | {"mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_heads": 2}
    known = transformers.Qwen3VLMoeTextConfig.__dataclass_fields__
    text = {name: value for name, value in text.items() if name in known}
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeForConditionalGeneration(
            transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
        )
    moeforge.bridge(model)
    assert model.get_experts_implementation()["text_config"] == "moeforge"
    first, second = moeforge.experts(model)
    assert (first.layer, second.layer, second.name) == (0, 1, "model.language_model.layers.1.mlp")


@pytest.mark.parametrize("family", ["mixtral", "aria", "gpt_oss", "nemotron_h"])
def test_choices_of_other_processes_are_left_out(family):
    module = next(module for module in families.build(family).modules() if is_experts(module))
    x = torch.randn(5, module.down_proj.shape[2 if module.is_transposed else 1])
    ids = torch.tensor([[0, 3], [6, 1], [2, 6], [6, 6], [5, 4]])
    weights = torch.rand(5, 2)
    want = torch.zeros_like(x)
    module.config._experts_implementation = "eager"
    for token, choice in ((ids < 6).nonzero()).tolist():
        one, at = ids[token : token + 1, choice : choice + 1], weights[token : token + 1, choice : choice + 1]
        want[token] += module(x[token : token + 1], one, at)[0]
    module._is_expert_parallel = True
    torch.testing.assert_close(experts_forward(module, x, ids, weights), want)
    nobody = experts_forward(module, x, torch.full_like(ids, 6), weights)
    assert torch.equal(nobody, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("family", "setting", "name", "kernel"),
    [
        ("mixtral", "hidden_act", "silu", "swiglu"),
        ("mixtral", "hidden_act", "swish", "swiglu"),
        ("mixtral", "hidden_act", "gelu", "geglu"),
        ("mixtral", "hidden_act", "gelu_pytorch_tanh", None),
        ("mixtral", "hidden_act", "relu", None),
        ("nemotron_h", "mlp_hidden_act", "silu", "silu"),
        ("nemotron_h", "mlp_hidden_act", "swish", "silu"),
        ("nemotron_h", "mlp_hidden_act", "gelu", "gelu"),
        ("nemotron_h", "mlp_hidden_act", "relu", "relu"),
        ("nemotron_h", "mlp_hidden_act", "gelu_new", None),
    ],
)
def test_an_activation_is_the_kernels_only_where_it_is_the_same(family, setting, name, kernel):
    model = families.build(family, **{setting: name})
    assert {kernel_activation(module) for module in model.modules() if is_experts(module)} == {kernel}
    want, _ = families.run(model, "eager", IDS)
    got, _ = families.run(model, "moeforge", IDS)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gemma4"])
def test_bfloat16_stays_bfloat16(family):
    model = families.build(family)
    module = next(module for module in model.modules() if is_experts(module))
    x, ids, weights = torch.randn(5, 32), torch.tensor([[0, 3], [5, 1], [2, 0], [1, 2], [5, 4]]), torch.rand(5, 2)
    want = experts_forward(module, x, ids, weights)
    got = experts_forward(module.to(torch.bfloat16), x.bfloat16(), ids, weights)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.05)


def test_a_folder_opens_on_the_engines_and_writes_the_same(tmp_path):
    families.build("qwen3_moe").save_pretrained(tmp_path)
    texts = {}
    for implementation in ("eager", "moeforge"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        assert model.get_experts_implementation() == {"": implementation}
        texts[implementation] = model.generate(IDS, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(texts["eager"], texts["moeforge"])


def test_training_steps_are_the_same():
    losses = {}
    for implementation in ("eager", "moeforge"):
        model = families.build("deepseek_v3").train()
        model.set_experts_implementation(implementation)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses[implementation] = []
        for _ in range(5):
            loss = model(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    assert losses["moeforge"][-1] < losses["moeforge"][0]
    assert losses["moeforge"] == pytest.approx(losses["eager"], rel=1e-4)


KNOWN = "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known; assert 'moeforge' in known"


@pytest.mark.parametrize(
    "program",
    [
        f"import moeforge, sys; assert not {{'torch', 'transformers'}} & {{*sys.modules}}; {KNOWN}",
        f"import transformers.integrations.moe, moeforge; {KNOWN}",
    ],
)
def test_either_may_be_imported_first(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'moeforge\[hf\]'"):
        moeforge.bridge(torch.nn.Linear(2, 2))
