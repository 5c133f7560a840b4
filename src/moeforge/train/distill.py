"""A run that learns from a trained model besides its text, for all of its steps or for the first of them."""

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config
from moeforge.data.packing import IGNORED, Batch
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub import load


class Distill(Config):
    """Adds ``weight`` times the divergence of this model's next tokens from a teacher's to the loss.

    A student may be too small to follow its teacher to the end: it then does better once the teacher has stopped
    (Mixture-of-Students, arXiv:2201.05596, section 4.2).
    """

    teacher: str
    """Folder of a run or a model, with the same tokenizer."""
    weight: float = Field(1.0, gt=0)
    """Of the divergence, beside one for the text."""
    until: float = Field(1.0, gt=0, le=1)
    """Fraction of the steps after which the teacher stops."""
    temperature: float = Field(1.0, gt=0)
    """Both models' logits are divided by it, and the divergence multiplied by its square (arXiv:1503.02531)."""

    def acts(self, step: int, steps: int) -> bool:
        """Whether the teacher has a say in optimizer step ``step`` (from 0) of so many."""
        return step < round(self.until * steps)


class Teacher:
    """The teacher of a run. It writes nothing and draws no random numbers."""

    def __init__(self, config: Distill, tokenizer: Tokenizer, seq_len: int, device: torch.device) -> None:
        """Raises UserError where the folder is no model, or one of other tokens or shorter texts."""
        self.config = config
        self.model, its_tokenizer = load(Path(config.teacher), device=str(device))
        check_tokenizer("distill.teacher", config.teacher, its_tokenizer, tokenizer)
        if self.model.config.max_seq_len < seq_len:
            longest = self.model.config.max_seq_len
            raise UserError(f"distill.teacher: {config.teacher} reads at most {longest} tokens, seq_len is {seq_len}")

    def loss(self, logits_BLV: Tensor, batch: Batch) -> Tensor:
        """Summed over all labels that are not -100, in nats: KL(teacher || student) times the squared temperature.

        A teacher whose vocabulary was rounded up says nothing about the tokens that it has besides.
        """
        with torch.no_grad():
            known, place = batch.known, {"position": batch.position, "document": batch.document}
            teacher_BLV = self.model(batch.input_ids, **place, known=known).logits
        temperature, seen = self.config.temperature, batch.labels != IGNORED
        log_student, log_teacher = (
            (logits[seen].to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
            for logits in (logits_BLV, teacher_BLV[..., : logits_BLV.shape[-1]])
        )
        return (log_teacher.exp() * (log_teacher - log_student)).sum() * temperature**2


def check_tokenizer(setting: str, folder: str | Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raises UserError where the model of ``folder`` has other tokens."""
    if theirs.inner.to_str() != ours.inner.to_str():
        raise UserError(f"{setting}: {folder} has another tokenizer: name it with --tokenizer.path={folder}")
