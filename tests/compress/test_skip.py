"""Choices that are skipped, against the tokens' own scores."""

from pathlib import Path

import pytest
import torch

from moeforge.compress.plan import Plan, Row, Skip, packable
from moeforge.compress.profile import profile
from moeforge.compress.prune import skip
from moeforge.compress.stream import Streamed
from moeforge.compress.write import Job
from moeforge.errors import UserError
from moeforge.hub.folder import open_model
from moeforge.models import Decoder
from moeforge.moe import Routing
from tests.compress.small import batches, model_folder

ROUTERS = {
    "softmax": {},
    "logits": {"score": "logits", "weigh": {"type": "softmax", "weight_scale": 2.0}},
    "biased": {"score": "sigmoid", "weigh": {"normalize_weights": True}, "controller": "expert_bias", "losses": []},
}
IDS = batches()[0].input_ids


def made(folder: Path, router: dict[str, object], k: int = 3) -> Streamed:
    moe = {"experts": {"num_experts": 6, "d_expert": 24}, "router": {"select": {"k": k}, **router}}
    model_folder(folder, moe=moe, layers={}, first_dense_layers=0, num_layers=2)
    return Streamed(folder)


def without(streamed: Streamed, skips: dict[int, Skip], folder: Path) -> Decoder:
    rows = tuple(Row(layer=layer, expert=expert) for layer, expert in packable(streamed.config))
    Job(streamed, Plan(rows=rows, skip=skips, dense="as stored")).run(folder)
    return open_model(folder)


def shares(routing: Routing, router: str) -> torch.Tensor:
    """[T, 2] of both later choices, of the first one's score, token by token."""
    scores = (routing.scores.exp() if router == "logits" else routing.scores).detach()
    best = scores.sort(dim=1, descending=True).values
    return best[:, 1:3] / best[:, :1]


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_the_share_of_later_choices_that_was_asked_for_is_not_run(tmp_path: Path, router: str) -> None:
    streamed = made(tmp_path / "m", ROUTERS[router])
    found = skip(profile(streamed, batches()), 0.5, streamed.config)
    model, original = without(streamed, found, tmp_path / "out"), open_model(tmp_path / "m")
    assert model.config.moe.router.select.type == "top_k" != model.config.all_layers[0].moe.router.select.type
    later = []
    for batch in batches():
        own, before = (
            {"input_ids": batch.input_ids, "position": batch.position, "document": batch.document} for _ in "ab"
        )
        routing, was = model(**own).routings[0], original(**before).routings[0]
        ratios = shares(was, router)
        assert torch.equal(routing.route.counts.sum(), (ratios >= found[0].min_ratio).sum() + len(ratios))
        later.append(ratios.flatten())
    assert found[0].min_ratio == pytest.approx(float(torch.cat(later).median()), rel=1e-2)
    assert found[0].typical == 2


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_where_nothing_is_under_the_ratio_nothing_changes(tmp_path: Path, router: str) -> None:
    streamed = made(tmp_path / "m", ROUTERS[router])
    none = {layer: Skip(min_ratio=1e-9, typical=3) for layer in (0, 1)}
    found, wanted = without(streamed, none, tmp_path / "out")(IDS), open_model(tmp_path / "m")(IDS)
    assert float((found.logits.float() - wanted.logits).norm() / wanted.logits.norm()) < 1e-2  # experts in bfloat16


def test_the_ratios_include_the_bias_that_choices_are_made_by(tmp_path: Path) -> None:
    streamed = made(tmp_path / "m", ROUTERS["biased"], k=2)
    model = open_model(tmp_path / "m")
    model.moe_layers[0].router.expert_bias[0] = 9.0
    model.save_pretrained(tmp_path / "b")
    ratio = profile(Streamed(tmp_path / "b"), batches()).layers[0].ratio
    assert len(ratio) == 101 and float(ratio[-1]) < 0.2 < float(profile(streamed, batches()).layers[0].ratio[-1])


def test_what_cannot_be_skipped_is_refused(tmp_path: Path) -> None:
    one = made(tmp_path / "one", {}, k=1)
    with pytest.raises(UserError, match="no token has a choice after its first"):
        skip(profile(one, batches()), 0.5, one.config)
    for name, streamed, why in (
        ("one", one, "k of 2 or more"),
        ("p", made(tmp_path / "p", {"select": {"type": "top_p"}}), "select: top_k"),
    ):
        with pytest.raises(UserError, match=why):
            without(streamed, {0: Skip(min_ratio=0.5, typical=1.5)}, tmp_path / f"{name} out")
    with pytest.raises(UserError, match=r"layers that are not there: \[7\]"):
        without(one, {7: Skip(min_ratio=0.5, typical=1)}, tmp_path / "none")
    assert not [*tmp_path.glob("* out"), *tmp_path.glob("none")]
