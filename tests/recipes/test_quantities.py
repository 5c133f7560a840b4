"""What claims are about, against loops over tokens, layers and experts."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from moeforge.config import build
from moeforge.data.document import Document
from moeforge.data.packing import Batch, evaluation_batches, pack
from moeforge.data.prepare import TextData
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.errors import UserError
from moeforge.evaluate import bits_per_byte
from moeforge.models import Decoder, ModelConfig
from moeforge.moe import Context, MoE
from moeforge.recipes.quantities import NOISE, QUANTITIES, agrees, flipped, local, share_of_choices
from moeforge.recipes.reproduce import HIGHER, Measured, gain, measured, text_of
from moeforge.train import RunConfig
from moeforge.train.config import Against
from tests.moe import brute_force

D, E, B, L = 8, 4, 4, 6
CONFIG = {
    "vocab_size": 257,
    "d_model": D,
    "num_layers": 2,
    "num_heads": 2,
    "moe": {"experts": {"num_experts": E, "d_expert": 5}, "router": {"select": {"k": 2}}},
}


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(build(ModelConfig, CONFIG | {"init": {"type": "normal", "std": 0.5}})).eval()


def batch() -> Batch:
    ids, position = torch.randint(257, (B, L + 1)), torch.arange(L).expand(B, L)
    none = torch.zeros(B, L, dtype=torch.int64)
    return Batch(ids[:, :-1], ids[:, 1:], none, position, none, num_bytes=B * L)


def by_loop(decoder: Decoder, texts: list[Batch], found: Callable[[MoE, torch.Tensor, int, list[int]], int]) -> float:
    """Share of choices, ``found`` counting those of one token of one layer."""
    hits, total = 0, 0
    for text in texts:
        rows: dict[MoE, torch.Tensor] = {}
        keep = rows.__setitem__
        hooks = [
            moe.router.register_forward_hook(lambda _, given, __, moe=moe, keep=keep: keep(moe, given[0]))
            for moe in decoder.moe_layers.values()
        ]
        decoder(text.input_ids)
        for hook in hooks:
            hook.remove()
        for moe, x_TD in rows.items():
            for token, x_D in enumerate(x_TD):
                best = brute_force.ranked((moe.router.gate.weight @ x_D).tolist())[:2]
                hits, total = hits + found(moe, x_D, token, best), total + 2
    return hits / total


@torch.no_grad()
def test_agreement_is_with_the_experts_whose_outputs_are_longest() -> None:
    def loudest(moe: MoE, x_D: torch.Tensor, token: int, best: list[int]) -> int:
        norms = [float(out.norm()) for out in brute_force.BANKS["mlp"](moe.banks[0], x_D[None])]
        return len({*best} & {*brute_force.ranked(norms)[:2]})

    decoder, texts = model(), [batch(), batch()]
    share = share_of_choices(agrees, decoder, texts)
    assert share == by_loop(decoder, texts, loudest) and 0 < share < 1


@torch.no_grad()
def test_local_choices_are_of_the_half_that_is_the_sequences() -> None:
    def stays(moe: MoE, x_D: torch.Tensor, token: int, best: list[int]) -> int:
        return sum((expert < E // 2) == (token // L % 2 == 0) for expert in best)

    decoder, texts = model(), [batch(), batch()]
    share = share_of_choices(local, decoder, texts)
    assert share == by_loop(decoder, texts, stays) and 0 < share < 1


@torch.no_grad()
def test_flips_are_choices_that_a_scaled_draw_undoes() -> None:
    moe = model().moe_layers[0]
    x_TD, context = torch.randn(200, D) * 3, Context(banks=tuple(moe.banks))
    noise_TD = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    lost = 0
    for x_D, noise_D in zip(x_TD, noise_TD, strict=True):
        moved_D = x_D + NOISE * x_D.square().mean().sqrt() * noise_D
        before, after = (brute_force.ranked((moe.router.gate.weight @ row).tolist())[:2] for row in (x_D, moved_D))
        lost += len({*before} - {*after})
    found = int(flipped(moe.router, x_TD, context, moe.router(x_TD, context)).sum())
    assert found == lost and 0 < lost < 200


def test_choices_of_a_model_that_chooses_nothing_are_refused() -> None:
    soft = {"score": "logits", "select": {"type": "soft", "slots": 8}, "losses": [], "weigh": "scores"}
    decoder = Decoder(
        build(ModelConfig, CONFIG | {"moe": {"experts": {"num_experts": E, "d_expert": 5}, "router": soft}})
    )
    with pytest.raises(UserError, match="select: soft and merged choose no experts: take by=bits_per_byte"):
        share_of_choices(local, decoder, [batch()])


@torch.no_grad()
def test_gap_and_worst_domain() -> None:
    tokenizer, names = train_or_open(Bytes(), []), ("code", "text")
    documents = [
        Document(name=str(n), text=text * 3, domain=domain)
        for n, (text, domain) in enumerate([("def f(): pass\n", "code"), ("once upon a time ", "text")] * 6)
    ]
    train, validation = (pack(part, tokenizer, names) for part in (documents[:8], documents[8:]))
    data, config = TextData(train, validation, tokenizer, names), RunConfig(batch_size=2, seq_len=16)
    decoder = model()
    bits = [
        bits_per_byte(decoder, evaluation_batches(part, 2, 16)).bits_per_byte for part in (data.train, data.validation)
    ]
    assert QUANTITIES["generalisation_gap"](decoder, data, config) == pytest.approx(bits[1] - bits[0])
    losses: dict[int, list[float]] = {0: [], 1: []}
    for text in evaluation_batches(validation, 2, 16):
        logits = decoder(text.input_ids, position=text.position, document=text.document).logits
        for row in range(len(text.labels)):
            for column in range(16):
                if text.labels[row, column] >= 0:
                    loss = F.cross_entropy(logits[row, column], text.labels[row, column])
                    losses[int(text.domain[row, column])].append(float(loss))
    worst = max(sum(part) / len(part) for part in losses.values())
    assert QUANTITIES["worst_domain_loss"](decoder, data, config) == pytest.approx(worst, rel=1e-5)


def test_every_quantity_has_a_place_and_a_direction() -> None:
    numbers = {field.name for field in fields(Measured)}
    assert {*QUANTITIES} <= {*get_args(Against.model_fields["by"].annotation)} <= numbers
    base = dict.fromkeys(numbers, 1.0)
    ours, other = Measured(**base), Measured(**base | dict.fromkeys(QUANTITIES, 0.5))
    assert {by for by in QUANTITIES if gain(by, ours, other) > 0} == {*HIGHER} - {"load_entropy"}


def test_a_run_that_was_measured_before_is_asked_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {n} of {n * 7} words" for n in range(300)))
    changes = {"data": {"type": "files", "path": str(tmp_path)}, "steps": 2, "batch_size": 2, "seq_len": 32}
    config = build(RunConfig, changes | {"model": CONFIG | {"vocab_size": None}})
    first = measured(config, tmp_path / "run", text_of(config))
    assert first.agreement is None
    second = measured(config, tmp_path / "run", text_of(config), by="agreement")
    assert second.agreement is not None and second.bits_per_byte == first.bits_per_byte
    assert json.loads((tmp_path / "run" / "measured.json").read_text())["agreement"] == second.agreement
    monkeypatch.setitem(QUANTITIES, "agreement", lambda *_: pytest.fail("measured twice"))
    assert measured(config, tmp_path / "run", text_of(config), by="agreement") == second
