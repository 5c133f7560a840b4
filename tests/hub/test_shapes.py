"""Random models by shape: transformers opens them as its own, and routing is spread as a benchmark needs it."""

from pathlib import Path

import pytest
import torch

from moeforge.errors import UserError
from moeforge.hub import load, shapes
from moeforge.hub.bridge import open_theirs


def test_a_random_model_opens_here_and_in_transformers_and_spreads_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.SHAPES["olmoe-5m"] | {"vocab_size": 300})
    shapes.write_random("small", tmp_path / "small")
    model, tokenizer = load(tmp_path / "small")
    assert tokenizer.vocab_size == 300 and model.embedding.weight.dtype == torch.bfloat16
    ids = torch.randint(0, 300, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.float()(ids)
        theirs = open_theirs(tmp_path / "small")(ids).logits
    torch.testing.assert_close(ours.logits, theirs, atol=1e-4, rtol=1e-4)
    for routing in ours.routings.values():
        experts = int((routing.route.counts > 0).sum())
        assert experts > 40  # of 64, by 64 tokens of 8 choices each


def test_there_is_no_other_shape(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no shape 'huge': olmoe-1b, olmoe-5m"):
        shapes.write_random("huge", tmp_path / "m")
    assert not list(tmp_path.iterdir())
