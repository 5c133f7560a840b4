"""Models of our own type in transformers: the same logits and text, and everything that others do with a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.errors import UserError
from moeforge.generate import Sampling, generate
from moeforge.hub import load, save
from moeforge.models import Decoder
from tests.hub import own

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'moeforge[hf]'")
Auto = transformers.AutoModelForCausalLM
IDS = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module", params=own.SHAPES)
def folder(request, tmp_path_factory) -> Path:
    return own.write(tmp_path_factory.mktemp("own") / "m", own.SHAPES[request.param])


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> Path:
    return own.write(tmp_path_factory.mktemp("own") / "m")


def greedy(model, ids, **how):
    """The new tokens of each row, 257 where a row has ended."""
    mask = how.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 256, **how}
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("first", ["moeforge", "transformers"])
def test_both_imports_suffice_in_either_order(pyramid, first):
    second = {"moeforge": "transformers", "transformers": "moeforge"}[first]
    code = f"""
import {first}
from transformers import AutoModelForCausalLM, AutoConfig
import {second}
model = AutoModelForCausalLM.from_pretrained({str(pyramid)!r})
assert type(AutoConfig.from_pretrained({str(pyramid)!r})) is type(model.config)
assert type(model).__module__ == "moeforge.hub.auto_model"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=120)


def test_the_same_logits_and_router_logits(folder):
    model, (ours, _) = Auto.from_pretrained(folder), load(folder)
    found, want = model(IDS, output_router_logits=True), ours(IDS)
    torch.testing.assert_close(found.logits, want.logits, atol=1e-5, rtol=0)
    for got, routing in zip(found.router_logits, want.routings.values(), strict=True):
        assert routing.logits is got is None or torch.allclose(got, routing.logits, atol=1e-5)
    assert model(IDS).router_logits is None
    assert torch.equal(model(IDS, logits_to_keep=2).logits, model(IDS).logits[:, -2:])
    assert torch.equal(model(IDS, return_dict=False)[0], model(IDS).logits)


def test_greedy_text_is_that_of_moeforge_generate(folder):
    model, (ours, tokenizer) = Auto.from_pretrained(folder), load(folder)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "def f(x):"
    assert read(prompt).input_ids == tokenizer.encode(prompt)
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(prompt)]])
    want = [t.token_id for t in generate(ours, tokenizer, prompt, Sampling(temperature=0, max_tokens=12)).tokens]
    assert [token for token in greedy(model, ids)[0].tolist() if token != 256] == want and len(want) > 3


def test_left_padding_and_the_cache_change_no_text(folder):
    model = Auto.from_pretrained(folder)
    alone = [greedy(model, row[None, cut:], use_cache=False)[0] for row, cut in zip(IDS, (0, 3, 5), strict=True)]
    mask = torch.ones_like(IDS)
    for row, cut in enumerate((0, 3, 5)):
        mask[row, :cut] = 0
    together = greedy(model, IDS.masked_fill(mask == 0, 256), attention_mask=mask)
    assert torch.equal(together, torch.stack(alone))


def test_beams_are_reordered_with_the_cache(folder):
    model = Auto.from_pretrained(folder)
    found = [greedy(model, IDS, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found) and not torch.equal(found[0], greedy(model, IDS))


def test_text_goes_on_from_a_cache(folder):
    model = Auto.from_pretrained(folder)
    first = model(IDS[:, :4], use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values)
    together = torch.cat((first.logits, rest.logits), 1)
    torch.testing.assert_close(together, model(IDS, use_cache=False).logits, atol=1e-4, rtol=0)


def test_loss_is_the_mean_over_labels_and_balances_while_training(pyramid):
    model = Auto.from_pretrained(pyramid)
    labels = IDS.masked_fill(IDS % 5 == 0, -100)
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=labels).loss, want)
    found = model.train()(IDS, labels=labels)
    routers, balance = model.decoder.routers, 0
    for where, routing in model.decoder(IDS).by_name.items():
        for name, value in routers[where].balance_losses(routing, len(IDS)).items():
            balance += routers[where].loss_weights[name] * value
    torch.testing.assert_close(found.aux_loss, balance)
    torch.testing.assert_close(found.loss, want + balance)
    count = int((labels[:, 1:] != -100).sum())
    half = model(IDS, labels=labels, num_items_in_batch=2 * count)
    torch.testing.assert_close(half.loss, found.loss / 2)


def test_saving_gives_the_same_tensors_and_a_folder_that_our_verbs_open(folder, tmp_path):
    model = Auto.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    own.tokenizer().save(tmp_path / "again")
    ours, _ = load(tmp_path / "again")
    assert ours.config == model.decoder.config
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    fresh = Auto.from_config(transformers.AutoConfig.from_pretrained(folder))
    fresh.save_pretrained(tmp_path / "fresh")
    assert load_file(tmp_path / "fresh" / "model.safetensors").keys() == before.keys()
    assert fresh.decoder.embedding.weight.std() > 0.2, "it starts by its own config's rule"


def test_every_token_that_ends_a_text_is_known_and_kept(tmp_path):
    tokenizer = own.tokenizer()
    save(own.build(own.PYRAMID), type(tokenizer)(tokenizer.inner, tokenizer.eos_id, [10]), tmp_path / "m")
    model = Auto.from_pretrained(tmp_path / "m")
    assert model.generation_config.eos_token_id == [256, 10] and model.config.pad_token_id == 256
    model.save_pretrained(tmp_path / "again")
    tokenizer.save(tmp_path / "again")
    assert load(tmp_path / "again")[1].end_ids == {10, 256}


def test_dtype_and_a_larger_vocabulary(pyramid, tmp_path):
    model = Auto.from_pretrained(pyramid, dtype=torch.bfloat16)
    assert model.dtype == model(IDS).logits.dtype == torch.bfloat16
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "larger")
    again = Auto.from_pretrained(tmp_path / "larger")
    assert again.config.vocab_size == 260 and again(IDS).logits.shape[-1] == 260 and again.dtype == torch.bfloat16


def test_a_trainer_trains_and_its_checkpoints_open(pyramid, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = Auto.from_pretrained(pyramid)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    settings = transformers.TrainingArguments(
        **{"output_dir": tmp_path, "max_steps": 6, "learning_rate": 1e-2, "report_to": [], "use_cpu": True},
        **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "save_steps": 6, "logging_steps": 1},
        **{"activation_checkpointing": True, "disable_tqdm": True, "seed": 1, "logging_nan_inf_filter": False},
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 1
    saved = Auto.from_pretrained(tmp_path / "checkpoint-6")
    torch.testing.assert_close(saved(IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=0)


# peft asks transformers by a name that it is to lose.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_on_attention_trains_and_merges(pyramid, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    base = Auto.from_pretrained(pyramid)
    before = base(IDS).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = model.eval()(input_ids=IDS).logits
    assert not torch.allclose(trained, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(Auto.from_pretrained(pyramid), tmp_path / "adapter")
    torch.testing.assert_close(adapted(input_ids=IDS).logits, trained)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    own.tokenizer().save(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")[0](IDS).logits, trained, atol=1e-4, rtol=1e-4)


def test_a_model_that_routes_by_domain_is_told_which(tmp_path):
    router = {"gate": {"type": "lookup", "by": "domain", "num_ids": 2}, "losses": []}
    moe = {"experts": {"num_experts": 4, "d_expert": 8}, "router": router}
    model = Auto.from_pretrained(own.write(tmp_path / "m", {"moe": moe, "domains": ["code", "prose"]}))
    with torch.no_grad():
        for layer in model.decoder.moe_layers.values():
            layer.router.gate.table.copy_(torch.tensor([[5.0, 4.0, 0, 0], [0, 0, 5.0, 4.0]]))
    assert not torch.equal(greedy(model, IDS, domain="code"), greedy(model, IDS, domain="prose"))
    with pytest.raises(UserError, match="routes by domain: name one"):
        model(IDS)


REFUSED = {
    "attention weights": ({"output_attentions": True}, "output_attentions: this model keeps no attention weights"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states: this model hands on"),
    "a mask of pairs": ({"attention_mask": torch.ones(3, 1, 9, 9)}, "attention_mask has 4 dimensions"),
    "embeddings": ({"inputs_embeds": torch.ones(3, 9, 16)}, "reads input_ids, not inputs_embeds"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_do_is_refused(pyramid, what):
    asked, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        Auto.from_pretrained(pyramid)(IDS, **asked)


def test_a_static_cache_and_an_option_of_nobody_are_refused(pyramid):
    model = Auto.from_pretrained(pyramid)
    with pytest.raises(UserError, match="StaticCache does not fit this model: leave cache_implementation out"):
        greedy(model, IDS, cache_implementation="static")
    with pytest.raises(ValueError, match="not used by the model"):
        greedy(model, IDS, max_new_tokenz=3)


@pytest.mark.parametrize("shape", [own.COMPARES, own.IN_BLOCKS])
def test_layers_that_compare_tokens_do_not_generate_nor_read_padding(tmp_path, shape):
    model = Auto.from_pretrained(own.write(tmp_path / "m", shape))
    assert torch.isfinite(model(IDS, labels=IDS).loss)
    with pytest.raises(UserError, match="a token's experts depend on other tokens"):
        greedy(model, IDS)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    with pytest.raises(UserError, match="compare tokens, padding too"):
        model(IDS, attention_mask=mask)


def change(folder: Path, edit) -> None:
    """Rewrites ``config.json``."""
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit(tree)
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")


def newer(tree: dict) -> None:
    """As a later version might write it."""
    tree["moeforge_version"] = "99.1"
    tree["model"]["telepathy"] = True


@pytest.mark.parametrize("opening", [Auto.from_pretrained, load])
def test_a_folder_of_a_newer_version_says_so(tmp_path, opening):
    folder = own.write(tmp_path / "m")
    change(folder, newer)
    with pytest.raises(UserError, match=r"(?s)telepathy is not a setting.*was written by moeforge 99\.1, this is"):
        opening(folder)


def test_weights_that_do_not_fit_are_named_and_nothing_stays_random(tmp_path):
    folder = own.write(tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "blocks.1.moe.banks.0.down_proj"}, file)
    with pytest.raises(UserError, match=r"missing decoder\.blocks\.1\.moe\.banks\.0\.down_proj"):
        Auto.from_pretrained(folder)
    save_file(tensors | {"stranger": torch.ones(1)}, file)
    with pytest.raises(UserError, match="unexpected stranger"):
        Auto.from_pretrained(folder)


def test_a_tokenizer_of_another_size_is_refused_by_our_verbs(pyramid, tmp_path):
    model = Auto.from_pretrained(pyramid)
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "m")
    own.tokenizer().save(tmp_path / "m")
    with pytest.raises(UserError, match="vocab_size 260, its tokenizer 257"):
        load(tmp_path / "m")


def test_its_experts_are_shown_by_their_names_in_the_file(folder):
    model = Auto.from_pretrained(folder)
    layers, plain = moeforge.experts(model), moeforge.experts(moeforge.load(folder))
    assert len(layers) == len(plain) > 0
    for one, other in zip(layers, plain, strict=True):
        for stack, same in zip(one.stacks, other.stacks, strict=True):
            assert [*stack.on_disk.values()] == [*same.on_disk.values()]
            assert all(model.get_parameter(name).numel() for name in stack.on_disk)


def test_the_decoder_itself_is_inside(pyramid):
    assert isinstance(Auto.from_pretrained(pyramid).get_decoder(), Decoder)
