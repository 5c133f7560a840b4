"""Whether a folder that was written gives back the model it was made of: to us byte by byte, to transformers' class in
its logits."""

from importlib.util import find_spec
from pathlib import Path

import torch

from moeforge.errors import UserError
from moeforge.hub.bridge import open_theirs
from moeforge.hub.families import FAMILIES
from moeforge.hub.folder import MODEL_TYPE, config_json, open_model
from moeforge.models import Decoder

TOLERANCE = 1e-4
"""Largest difference of two logits in float32, relative to the largest logit where that is above one."""


def check_opens_packed() -> None:
    """Raises UserError where transformers could not open experts that were packed."""
    missing = [name for name in ("transformers", "compressed_tensors") if find_spec(name) is None]
    if missing:
        raise UserError(f"packed experts are opened to be compared: pip install 'moeforge[compress]' for {missing[0]}")


def verify(folder: Path, model: Decoder) -> str:
    """Opens ``folder`` anew and says what was found equal. Raises UserError where something is not.

    Logits are compared in float32, so that both models must fit into memory in that.
    """
    before, after = model.state_dict(), open_model(folder).state_dict()
    differing = [name for name in before if name not in after or not _same(before[name], after[name])]
    if differing or after.keys() - before.keys():
        raise UserError(f"{folder} does not give back the model: {', '.join(differing) or 'more tensors'} differ")
    return f"{len(before)} tensors equal byte for byte, {_compare_logits(folder)}"


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@torch.no_grad()
def _compare_logits(folder: Path) -> str:
    """A few tokens through our decoder and through the family's class."""
    kind = config_json(folder)["model_type"]
    if kind == MODEL_TYPE or not FAMILIES[kind].in_transformers:
        return "no other implementation to compare logits with"
    if find_spec("transformers") is None:
        return "logits not compared: transformers is not installed (pip install 'moeforge[hf]')"
    # Experts that were packed stay in bfloat16, and transformers refuses to change a model that had some.
    theirs = torch.nn.Module.float(open_theirs(folder))
    model = open_model(folder, dtype=torch.float32)
    ids = torch.arange(16)[None] * 7919 % (model.config.vocab_size or 1)
    ours, others = model(ids).logits, theirs(ids).logits
    difference = float((ours - others).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(others.abs().max())):
        raise UserError(f"logits differ from those of {type(theirs).__name__} by {difference:.2g}")
    return f"logits within {difference:.1g} of {type(theirs).__name__}"
