"""One step is the same step however it is cut into micro-batches, and every loss is scaled once."""

from dataclasses import replace

import pytest
import torch

from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.models import Decoder, ModelConfig
from moeforge.train.config import AdamW
from moeforge.train.metrics import step_line
from moeforge.train.optimizer import build_optimizer
from moeforge.train.step import accumulate_gradients, apply_gradients

SIZE, LENGTH, VOCABULARY = 4, 12, 17


def model(over: str = "batch", controller: str | None = None, choices: str = "all", **parts: object) -> Decoder:
    torch.manual_seed(0)
    losses = [
        {"type": "load_balancing_loss", "weight": 0.5, "over": over, "choices": choices},
        {"type": "z_loss", "weight": 0.1},
    ]
    router = {"select": {"k": 2}, "losses": losses, "controller": controller, **parts}
    moe = {"experts": {"num_experts": 4, "d_expert": 8}, "router": router}
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=16, num_layers=2, num_heads=2, moe=moe, init={"type": "normal", "std": 0.3}
    )
    return Decoder(config).double()


def batch(rows: slice = slice(0, SIZE)) -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (SIZE, LENGTH + 1))
    position = torch.arange(LENGTH).expand(SIZE, -1)
    whole = Batch(ids[:, :-1], ids[:, 1:], torch.zeros(SIZE, LENGTH, dtype=torch.int32), position, position, 0)
    return replace(
        whole,
        **{name: getattr(whole, name)[rows] for name in ("input_ids", "labels", "document", "position", "domain")},
    )


def gradients(decoder: Decoder, batches: list[Batch]):
    result = accumulate_gradients(decoder, batches, torch.float32, 0)
    return result, {name: p.grad.clone() for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_accumulation_changes_nothing(over, choices):
    whole, expected = gradients(model(over, choices=choices), [batch()])
    parts, actual = gradients(model(over, choices=choices), [batch(slice(0, 1)), batch(slice(1, 4))])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for index in whole.tokens_per_expert:
        assert torch.equal(parts.tokens_per_expert[index], whole.tokens_per_expert[index])


def test_heads_are_balanced_as_experts_are():
    decoder = model()
    attention = {"type": "routed", "num_experts": 4, "router": {"losses": ["load_balancing_loss"]}}
    attention["router"]["controller"] = "expert_bias"
    decoder = Decoder(decoder.config.replace(attention=attention, moe=None)).double()
    result, whole = gradients(decoder, [batch()])
    assert result.losses["load_balancing"] >= 1 and result.rows == {"attention_00": 48, "attention_01": 48}
    line = step_line(1, result, 0.1, 1.0, 1)
    assert sum(line["moe/tokens_per_expert/attention_01"]) == 2 * SIZE * LENGTH
    decoder.zero_grad()
    _, parts = gradients(decoder, [batch(slice(0, 1)), batch(slice(1, 4))])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12, msg=name)
    apply_gradients(decoder, build_optimizer(decoder, AdamW()), result, 1.0, 0)
    assert all(router.expert_bias.any() for router in decoder.routers.values())


def test_micro_batch_scope_is_the_mean_by_tokens_and_differs_from_the_batch():
    _, exact = gradients(model("batch"), [batch(slice(0, 2)), batch(slice(2, 4))])
    _, local = gradients(model("micro_batch"), [batch(slice(0, 2)), batch(slice(2, 4))])
    gate = "blocks.0.moe.router.gate.weight"
    assert not torch.allclose(exact[gate], local[gate], rtol=1e-6)


def test_the_gradient_is_that_of_the_written_down_loss():
    decoder = model()
    _, actual = gradients(decoder, [batch()])
    decoder.zero_grad()
    output = decoder(batch().input_ids)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch().labels.flatten())
    for routing in output.routings.values():
        counts = torch.bincount(routing.route.expert, minlength=4)
        fraction = counts / counts.sum()
        loss = loss + 0.5 * 4 * (fraction * routing.probs.mean(0)).sum()
        loss = loss + 0.1 * routing.logits.logsumexp(-1).square().mean()
    loss.backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_the_bias_moves_once_per_step_against_the_load_of_all_micro_batches():
    decoder = model(controller="expert_bias")
    optimizer = build_optimizer(decoder, AdamW())
    result, _ = gradients(decoder, [batch(slice(0, 2)), batch(slice(2, 4))])
    assert all(not moe.router.expert_bias.any() for moe in decoder.moe_layers.values())
    apply_gradients(decoder, optimizer, result, 1.0, 0)
    for name, router in decoder.routers.items():
        load = result.tokens_per_expert[name].double()
        expected = 0.001 * torch.sign(load.mean() - load)
        torch.testing.assert_close(router.expert_bias.double(), expected, rtol=1e-6, atol=1e-9)
        assert int(load.sum()) == SIZE * LENGTH * 2


def test_the_bias_of_a_repeated_layer_moves_once_by_the_load_of_all_its_passes():
    decoder = Decoder(model(controller="expert_bias").config.replace(num_repeats=3)).double()
    result, _ = gradients(decoder, [batch()])
    apply_gradients(decoder, build_optimizer(decoder, AdamW()), result, 1.0, 0)
    assert list(result.tokens_per_expert) == list(decoder.routers) == [f"layer_{depth:02d}" for depth in range(6)]
    for index, block in enumerate(decoder.blocks):
        load = sum(result.tokens_per_expert[f"layer_{depth:02d}"].double() for depth in range(index, 6, 2))
        assert int(load.sum()) == 3 * SIZE * LENGTH * 2
        expected = 0.001 * torch.sign(load.mean() - load)
        torch.testing.assert_close(block.moe.router.expert_bias.double(), expected, rtol=1e-6, atol=1e-9)
    loads = step_line(1, result, 0.1, 1.0, 1)
    assert sorted(name for name in loads if "tokens_per_expert" in name)[-1] == "moe/tokens_per_expert/layer_05"


def test_recomputing_activations_changes_neither_gradients_nor_counts():
    whole, expected = gradients(model(), [batch()])
    decoder = model()
    decoder.recompute_activations = True
    again, actual = gradients(decoder, [batch()])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)
    for index in whole.tokens_per_expert:
        assert torch.equal(again.tokens_per_expert[index], whole.tokens_per_expert[index])


@pytest.mark.parametrize("name", ["blocks.1.moe.banks.0.down_proj", "blocks.0.attention.v_proj.weight"])
def test_a_loss_that_is_not_finite_names_the_layer(name):
    decoder = model()
    with torch.no_grad():
        dict(decoder.named_parameters())[name].fill_(float("nan"))
    with pytest.raises(UserError, match=r"step 8: the loss is nan.*" + name.rsplit(".", 1)[0].replace(".", r"\.")):
        accumulate_gradients(decoder, [batch()], torch.float32, 7)


def test_a_gradient_that_is_not_finite_names_the_weight_and_leaves_all_weights_alone():
    decoder = model()
    optimizer = build_optimizer(decoder, AdamW())
    result, _ = gradients(decoder, [batch()])
    decoder.blocks[1].attention.q_proj.weight.grad[0, 0] = float("inf")
    before = [p.detach().clone() for p in decoder.parameters()]
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.q_proj\.weight"):
        apply_gradients(decoder, optimizer, result, 1.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


def test_noise_is_the_same_in_the_pass_that_counts(monkeypatch):
    decoder, parts, seen = model(noise=["gumbel"]), [batch(slice(0, 1)), batch(slice(1, 4))], []
    router = decoder.moe_layers[0].router
    count = router.counts
    monkeypatch.setattr(router, "counts", lambda routing: seen.append(routing.choices) or count(routing))
    result = accumulate_gradients(decoder, parts, torch.float32, 0)
    assert len(seen) == 2
    assert torch.equal(result.tokens_per_expert["layer_00"], seen[0] + seen[1]), (
        "losses were given the counts of other draws"
    )


def test_what_a_capacity_leaves_out_is_counted_and_written():
    decoder = model(capacity=[{"type": "capacity", "capacity_factor": 0.5}])
    result = accumulate_gradients(decoder, [batch()], torch.float32, 0)
    line, chosen = step_line(1, result, 0.1, 1.0, 1), result.tokens_per_expert["layer_00"].sum().item()
    assert (
        line["moe/drop_rate/layer_00"] == result.dropped["layer_00"] / chosen
        and 0.3 < line["moe/drop_rate/layer_00"] < 0.7
    )
    plain = accumulate_gradients(model(), [batch()], torch.float32, 0)
    assert not any(name.startswith("moe/drop_rate") for name in step_line(1, plain, 0.1, 1.0, 1))
