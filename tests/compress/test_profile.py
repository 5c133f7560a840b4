"""What a profile holds, against sums token by token; what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeforge.compress.profile import FLOOR, FORMATS, Profile, profile
from moeforge.compress.rounding import to_format
from moeforge.compress.stream import Streamed
from moeforge.errors import UserError
from moeforge.hub import load, save
from moeforge.kernels.activation import activate
from tests.compress.small import batches, model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("profile") / "m")


@torch.no_grad()
def test_every_number_is_a_sum_over_the_tokens(folder: Path) -> None:
    model, _ = load(folder)
    seen = profile(Streamed(folder), batches()).layers[1]
    moe, rows, routes, streams = model.moe_layers[1], [], [], []
    moe.banks[0].register_forward_hook(lambda m, inputs, y: rows.append(inputs[0]))
    moe.banks[0].register_forward_hook(lambda m, inputs, y: routes.append(inputs[1]))
    model.blocks[2].register_forward_hook(lambda m, inputs, y: streams.append(inputs[0]))
    outputs = [model(b.input_ids, position=b.position, document=b.document) for b in batches()]
    count, weight, reap, square = (torch.zeros(4) for _ in range(4))
    read, inside = torch.zeros(4, 32), torch.zeros(4, 24)
    moment, together, joint = torch.zeros(4, 32), torch.zeros(4, 4), torch.zeros(4, 4)
    bank = moe.banks[0]
    for x, route in zip(rows, routes, strict=True):
        chosen = [[] for _ in range(len(x))]
        for token, expert, w in zip(route.token.tolist(), route.expert.tolist(), route.weight, strict=True):
            hidden = activate(bank.gate_up_proj[expert] @ x[token], "swiglu")
            count[expert] += 1
            weight[expert] += w
            square[expert] += w * w
            reap[expert] += w * (bank.down_proj[expert] @ hidden).norm()
            moment[expert] += x[token].square()
            read[expert] += (w * x[token]).square()
            inside[expert] += (w * hidden).square()
            chosen[token].append((expert, w * (bank.down_proj[expert] @ hidden)))
        for experts in chosen:
            for one, output in experts:
                for other, second in experts:
                    together[one, other] += 1
                    joint[one, other] += output @ second
    hint = [
        (bank.gate_up_proj[e].abs() * read[e].sqrt()).sum() + (bank.down_proj[e].abs() * inside[e].sqrt()).sum()
        for e in range(4)
    ]
    assert int(count.min()) >= FLOOR and len(outputs) == len(rows)
    for found, wanted in [
        (seen.count, count),
        (seen.weight, weight),
        (seen.weight_square, square),
        (seen.reap, reap / count),
        (seen.hint, torch.stack(hint)),
        (seen.input_moment, moment / count[:, None]),
        (seen.together, together),
        (seen.joint, joint / sum(map(len, rows))),
        (seen.energy, torch.cat([s.flatten(0, 1) for s in streams]).square().sum(1).mean()),
    ]:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert seen.next_together.shape == (4, 6) and int(seen.next_together.sum()) == 4 * sum(map(len, rows))
    assert 0 < float(seen.predicted) < 1


@torch.no_grad()
def test_errors_are_those_of_rounded_experts(folder: Path) -> None:
    model, _ = load(folder)
    seen, bank = profile(Streamed(folder), batches()).layers[1], model.moe_layers[1].banks[0]
    x = torch.randn(2000, 32) * seen.input_moment[0].sqrt()
    for at, format in enumerate(FORMATS):
        parts = [to_format(weight[:1], format) for weight in (bank.gate_up_proj, bank.down_proj)]
        up, down = (part.dequantise()[0] for part in parts)  # type: ignore[union-attr]
        exact = activate(x @ bank.gate_up_proj[0].T, "swiglu") @ bank.down_proj[0].T
        error = (activate(x @ up.T, "swiglu") @ down.T - exact).square().sum(1).mean()
        assert 0.3 < float(seen.error[0, at] / error) < 3
    assert (seen.error.diff(dim=1)[:, [0, 2, 4, 6]] >= 0).all()


def test_it_comes_back_from_disk_and_belongs_to_one_model(folder: Path, tmp_path: Path) -> None:
    made = profile(Streamed(folder), batches())
    made.save(tmp_path / "p")
    back = Profile.load(tmp_path / "p")
    assert back.about == made.about
    assert all(torch.equal(vars(back.layers[2])[name], value) for name, value in vars(made.layers[2]).items())
    back.check(Streamed(folder))
    with pytest.raises(UserError, match="another model"):
        back.check(Streamed(model_folder(tmp_path / "other", layers={})))
    tensors = load_file(tmp_path / "p" / "profile.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "2.hint"}, tmp_path / "p" / "profile.safetensors")
    with pytest.raises(UserError, match="profile of another version of moeforge: move it away"):
        Profile.load(tmp_path / "p")
    (tmp_path / "p" / "profile.json").write_text("{}")
    with pytest.raises(UserError, match="no profile"):
        Profile.load(tmp_path / "p")


def test_experts_with_few_tokens_are_named_and_get_statistics_of_all(tmp_path: Path) -> None:
    model, tokenizer = load(model_folder(tmp_path / "m"))
    model.moe_layers[2].router.expert_bias[3] = -100
    save(model, tokenizer, tmp_path / "biased")
    found = profile(Streamed(tmp_path / "biased"), batches())
    assert found.scarce == {2: [3]} and found.layers[2].count[3] == 0
    assert all(bool((seen.error > 0).all()) and bool((seen.reap > 0).all()) for seen in found.layers.values())


def test_a_short_text_and_one_of_another_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few"):
        profile(Streamed(folder), batches(20))
    small = model_folder(tmp_path / "m")
    streamed = Streamed(small)
    many = batches()
    many[0].input_ids[0, 0] = 257
    with pytest.raises(UserError, match="token 257"):
        profile(streamed, many)


def test_a_layer_that_is_done_leaves_memory(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    streamed = Streamed(model_folder(tmp_path / "m"))
    read = streamed.read(1)
    assert read
    del read
    assert str(tmp_path) not in maps.read_text()
