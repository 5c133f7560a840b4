"""A run that starts with the weights of a trained model."""

from pathlib import Path

import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub import load
from moeforge.models import Decoder
from moeforge.train.distill import check_tokenizer

ADDED = (".attention.router.", ".moe.router.auxiliary")
"""Weights that may be new."""


@torch.no_grad()
def start_from(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Writes the weights of ``folder`` into ``model``. Routers of attention and auxiliary experts that it does not have
    stay as they are.

    Where ``model`` has a stack of matrices for one of the folder's, as attentions side by side and frozen ones among
    them are, each starts as its copy. Raises UserError, before anything is written, when some weight of either has no
    place in the other.
    """
    source, its_tokenizer = load(folder)
    check_tokenizer("start_from", folder, its_tokenizer, tokenizer)
    theirs, ours = source.state_dict(), dict(model.state_dict())
    origin = {name: name.replace(".prior", ".weight") for name in ours}
    missing = [name for name in ours if origin[name] not in theirs and not any(part in name for part in ADDED)]
    unread = sorted(theirs.keys() - origin.values())
    unlike = [name for name in ours if origin[name] in theirs and not _fits(theirs[origin[name]], ours[name])]
    if missing or unread or unlike:
        problems = [f"it has no {name}" for name in missing] + [f"no place for its {name}" for name in unread]
        problems += [f"{name} has another shape" for name in unlike]
        raise UserError(f"start_from: {folder} does not fit the model: {'; '.join(problems[:5])}")
    for name, weight in ours.items():
        if origin[name] in theirs:
            weight.copy_(theirs[origin[name]])  # one matrix goes to all of a stack


def _fits(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return theirs.shape in (ours.shape, ours.shape[1:])
