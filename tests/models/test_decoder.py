"""The decoder: cached decoding, packed documents, tied tables, and recomputed activations."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.config import build
from moeforge.models import Cache, Decoder, ModelConfig
from moeforge.models.attention import locate
from moeforge.moe import MoE, MoEConfig, Router
from moeforge.moe.capacity import Capacity
from moeforge.moe.gates import Linear, Lookup
from moeforge.moe.scores import Relu
from moeforge.moe.select import Merged
from tests.moe import brute_force
from tests.moe.test_combinations import SLOTS, config_of

VOCAB, LENGTH = 19, 9
MOE = {"experts": {"num_experts": 6, "d_expert": 8}, "shared": {"d_expert": 8, "mix": "coefficient"}}
SHAPES: dict[str, dict[str, Any]] = {
    "moe": {"moe": MOE},
    "dense": {"qk_norm": True},
    "pyramid": {"moe": MOE, "first_dense_layers": 1, "layers": {2: {"moe": {"experts": {"num_experts": 12}}}}},
}


def decoder(shape: str = "moe", **changes: Any) -> Decoder:
    """Large enough weights that every part shows in the logits."""
    tree = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24}
    return Decoder(build(ModelConfig, tree | {"init": {"type": "normal", "std": 0.3}} | SHAPES[shape] | changes))


def ids(batch_size: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (batch_size, length))


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [3, 1, 4, 1], [LENGTH], [5, 4]], ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_decoding_is_the_full_pass(shape: str, sizes: list[int]) -> None:
    model, input_ids = decoder(shape), ids()
    cache = Cache(model, 2, LENGTH + 3)
    logits = [model(part, cache=cache).logits for part in input_ids.split(sizes, dim=1)]
    assert cache.length == LENGTH
    assert_close(torch.cat(logits, 1), model(input_ids).logits)


@torch.no_grad()
def test_a_token_sees_none_after_it() -> None:
    model, input_ids = decoder(), ids()
    changed = input_ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCAB
    one, other = model(input_ids).logits, model(changed).logits
    assert_close(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:], atol=1e-2)


MERGED = {"score": "logits", "weigh": "softmax", "losses": []}


def layers() -> dict[str, MoEConfig | None]:
    """One for every example of every member of every slot that can change what is computed."""
    slots = {name: parts for name, parts in SLOTS.items() if name not in ("losses", "controller")}
    own = [{name: part} for name, parts in slots.items() for part in parts]
    own += [{"gate": gate} for gate in (Linear(previous=True), Linear(reads="token"))]
    own += [{"gate": Lookup(by="token", num_ids=VOCAB), "select": Merged(over="equal_scores")}]
    own += [{"capacity": (Capacity(capacity_factor=0.5, keep=keep),)} for keep in ("heaviest", "random")]
    return {str(parts): config_of(parts) or config_of({"score": Relu(), **parts}) for parts in own}


LAYERS = layers()


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_a_token_sees_none_after_it_unless_its_router_says_so(layer: str) -> None:
    torch.manual_seed(3)
    config = LAYERS[layer]
    assert config is not None, "refused, with softmax and with relu"
    model = decoder(moe=config).eval()
    input_ids = ids(3, 32)
    changed = input_ids.clone()
    changed[:, 16:] = (changed[:, 16:] + 1) % VOCAB
    one, other = model(input_ids).logits[:, :16], model(changed).logits[:, :16]
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4) != config.router.leaks


@torch.no_grad()
def test_tokens_that_get_more_attention_get_no_fewer_experts() -> None:
    moe = {"experts": {"num_experts": 6, "d_expert": 8}, "router": {"select": {"type": "by_importance", "k": 2.5}}}
    model, input_ids = decoder(moe=moe), ids(4, 30)
    block, positions = model.blocks[0], locate(model.config, torch.arange(30).expand(4, 30), None, 0)
    importance_T = block.attention.received(block.attention_norm(model.embedding(input_ids)), positions).flatten()
    numbers_T = torch.bincount(model(input_ids).routings[0].route.token, minlength=120)[importance_T.argsort()]
    assert numbers_T.sum() == 300 and bool((numbers_T.diff() >= 0).all()) and len(numbers_T.unique()) > 2


@torch.no_grad()
def test_a_router_that_reads_the_token_sends_it_to_the_same_experts_wherever_it_stands() -> None:
    moe = MOE | {"router": {"gate": {"type": "linear", "reads": "token"}}}
    model, input_ids = decoder(moe=moe, embedding_scale=3.0), ids(4, 30)
    for routing in model(input_ids).routings.values():
        taken: dict[int, set[tuple[int, ...]]] = {}
        for token, experts in enumerate(routing.route.expert[routing.route.slot.argsort()].view(-1, 2).tolist()):
            taken.setdefault(int(input_ids.flatten()[token]), set()).add(tuple(experts))
        assert all(len(choices) == 1 for choices in taken.values()) and len(set.union(*taken.values())) > 3


@torch.no_grad()
def test_the_embedding_scale_multiplies_what_the_first_layer_gets() -> None:
    model, input_ids = decoder("dense"), ids()
    scaled = decoder("dense", embedding_scale=3.0, tie_embeddings=False)
    scaled.load_state_dict({**model.state_dict(), "output.weight": model.embedding.weight})
    larger = decoder("dense", tie_embeddings=False)
    larger.load_state_dict({**model.state_dict(), "output.weight": model.embedding.weight})
    larger.embedding.weight.mul_(3)
    assert_close(scaled(input_ids).logits, larger(input_ids).logits)


@torch.no_grad()
def test_a_packed_document_is_as_if_alone() -> None:
    model, input_ids = decoder(), ids()
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 0]])
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    packed = model(input_ids, position=position, document=document).logits
    for row in range(2):
        for number in document[row].unique():
            inside = document[row] == number
            assert_close(packed[row, inside], model(input_ids[row : row + 1, inside]).logits[0])
    assert not torch.allclose(packed, model(input_ids).logits, atol=1e-2)


@torch.no_grad()
def test_one_document_per_row_is_no_mask() -> None:
    model, input_ids = decoder(), ids()
    document = torch.tensor([[0], [1]]).expand(2, LENGTH)
    assert torch.equal(model(input_ids, document=document).logits, model(input_ids).logits)


def test_the_output_table_is_tied_or_its_own() -> None:
    tied, free = decoder(), decoder(tie_embeddings=False)
    assert tied.output is None and free.output is not None
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == VOCAB * 16
    assert "output.weight" in free.state_dict() and "output.weight" not in tied.state_dict()
    free.load_state_dict(tied.state_dict() | {"output.weight": tied.embedding.weight})
    input_ids = ids()
    assert_close(free(input_ids).logits, tied(input_ids).logits)


def test_routings_come_by_layer() -> None:
    model = decoder("pyramid")
    output = model(ids())
    assert list(output.routings) == list(model.moe_layers) == [1, 2]
    assert [routing.route.num_experts for routing in output.routings.values()] == [6, 12]
    assert all(routing.route.num_tokens == 2 * LENGTH for routing in output.routings.values())


@torch.no_grad()
def test_a_block_of_the_decoder_adds_the_brute_force_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, input_ids = decoder("pyramid"), ids()
    expected = model(input_ids).logits

    def experts(self: MoE, x_TD: Tensor, route: object) -> Tensor:
        return brute_force.layer(self, x_TD)

    monkeypatch.setattr(MoE, "experts", experts)
    assert_close(model(input_ids).logits, expected)


def step(model: Decoder, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its balance losses, and all gradients."""
    model.zero_grad()
    output = model(input_ids)
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    for index, routing in output.routings.items():
        loss = loss + sum(model.moe_layers[index].router.balance_losses(routing, len(input_ids)).values())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
def test_recomputed_activations_change_nothing_and_route_once(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], Router.forward

    def counted(self: Router, *arguments: Any) -> Any:
        calls.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(Router, "forward", counted)
    model, input_ids = decoder(shape), ids()
    loss, gradients = step(model, input_ids)
    calls.clear()
    model.recompute_activations = True
    again, recomputed = step(model, input_ids)
    assert calls == [moe.router for moe in model.moe_layers.values()]
    assert torch.equal(loss, again) and gradients.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def kept_bytes(model: Decoder, input_ids: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids)
    assert output.logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("shape", ["moe", "dense"])
def test_recomputed_activations_are_not_kept(shape: str) -> None:
    model, input_ids = decoder(shape), ids(8, 64)
    plain = kept_bytes(model, input_ids)
    model.recompute_activations = True
    assert kept_bytes(model, input_ids) < 0.6 * plain


def test_forward_writes_nothing_to_the_model() -> None:
    model = decoder()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    model(ids())
    assert before == {name: module.__dict__ for name, module in model.named_modules()}


def unrolled(model: Decoder) -> Decoder:
    """As many layers of their own, each with a copy of the repeated layer's weights."""
    layers, config = model.config.num_layers, model.config
    deep = Decoder(config.replace(num_layers=layers * config.num_repeats, num_repeats=1))
    state = model.state_dict()
    copies = {
        name: state[re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) % layers}", name)]
        for name in deep.state_dict()
    }
    deep.load_state_dict(copies)
    return deep


@pytest.mark.parametrize("gate", ["linear", "recurrent", {"type": "linear", "previous": True}], ids=str)
def test_repeats_are_unrolled_copies(gate: Any) -> None:
    repeated = decoder(num_layers=2, num_repeats=3, moe=MOE | {"router": {"gate": gate}})
    deep, input_ids = unrolled(repeated), ids()
    (loss, gradients), (expected, unrolled_gradients) = step(repeated, input_ids), step(deep, input_ids)
    torch.testing.assert_close(loss, expected)
    assert repeated.moe_layers.keys() == repeated(input_ids).routings.keys() == deep.moe_layers.keys()
    for name, gradient in gradients.items():
        number = re.match(r"blocks\.(\d+)\.", name)
        if number is None:
            summed = unrolled_gradients[name]
        else:
            depths = range(int(number[1]), 6, 2)
            summed = sum(unrolled_gradients.get(name.replace(number[1], str(d), 1), torch.zeros(())) for d in depths)
        torch.testing.assert_close(gradient, summed, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_repeated_layers_decode_with_keys_of_their_own_at_every_depth() -> None:
    model, input_ids = decoder(num_layers=2, num_repeats=2), ids()
    cache = Cache(model, 2, LENGTH)
    logits = [model(part, cache=cache).logits for part in input_ids.split([3, 1, 5], dim=1)]
    assert sorted(cache.layers) == [0, 1, 2, 3]
    assert_close(torch.cat(logits, 1), model(input_ids).logits)


def test_a_decoder_needs_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size is not set"):
        Decoder(ModelConfig())


PADDED: dict[str, dict[str, Any]] = {
    "moe": {},
    "window": {"window": 3, "layers": {1: {"window": None}}},
    "sinks": {"attention": {"sinks": True}, "window": 4},
    "latent": {
        "attention": {
            "type": "latent",
            "kv_lora_rank": 5,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 6,
            "v_head_dim": 3,
        }
    },
}


def padded(shape: str) -> tuple[Decoder, Tensor, Tensor]:
    """A model, and a batch of rows with 3 tokens missing in front, 2 at the end, and none."""
    changes = {"num_kv_heads": None} if shape == "latent" else {}
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[0, :3], mask[1, -2:] = 0, 0
    return decoder("moe", **changes, **PADDED[shape]).eval(), ids(3), mask


@pytest.mark.parametrize("shape", PADDED)
@torch.no_grad()
def test_a_padded_row_is_as_if_alone(shape: str) -> None:
    model, input_ids, mask = padded(shape)
    logits = model(input_ids, mask).logits
    for row in range(3):
        kept = mask[row].bool()
        torch.testing.assert_close(
            logits[row, kept], model(input_ids[row : row + 1, kept]).logits[0], rtol=0, atol=1e-5
        )
    changed = torch.where(mask.bool(), input_ids, (input_ids + 1) % VOCAB)
    torch.testing.assert_close(model(changed, mask).logits[mask.bool()], logits[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", PADDED)
@torch.no_grad()
def test_padded_prompts_decode_as_if_alone(shape: str) -> None:
    model, input_ids, mask = padded(shape)
    mask[1] = 1  # a prompt cannot have padding behind it and go on
    cache, whole = Cache(model, 3, LENGTH + 4), torch.cat((mask, torch.ones(3, 4, dtype=torch.int64)), 1)
    following = ids(3, 4)
    logits = [model(input_ids, mask, cache=cache).logits]
    for step in range(4):
        seen = whole[:, : LENGTH + step + 1]
        logits.append(model(following[:, step : step + 1], seen, cache=cache).logits)
    for row in range(3):
        kept = whole[row].bool()
        alone = model(torch.cat((input_ids, following), 1)[row : row + 1, kept]).logits[0]
        torch.testing.assert_close(torch.cat(logits, 1)[row, kept], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_without_padding_is_none_bit_for_bit() -> None:
    model, input_ids = decoder(), ids()
    assert torch.equal(model(input_ids, torch.ones(2, LENGTH)).logits, model(input_ids).logits)


def test_padding_that_sees_nothing_gives_no_gradient_but_numbers() -> None:
    model, input_ids, mask = padded("window")
    mask[2] = 0
    logits = model(input_ids, mask).logits
    (logits * mask[:, :, None]).sum().backward()
    assert logits.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model, input_ids = decoder(), ids()
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 8\], not \[2, 9\]: one column for each token"):
        model(input_ids, torch.ones(2, 8))
    cache = Cache(model, 2, LENGTH)
    model(input_ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 5\], not \[2, 9\]"):
        model(input_ids[:, 4:], torch.ones(2, 5), cache=cache)
    mask = torch.ones(2, LENGTH)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="packed documents or padding, not both"):
        model(input_ids, mask, document=torch.zeros_like(input_ids))


def test_neutral_settings_add_no_weights() -> None:
    names = " ".join(decoder().state_dict()) + " ".join(decoder("dense").state_dict())
    assert "bias" not in names.replace("shared.gate.bias", "") and "sinks" not in names
