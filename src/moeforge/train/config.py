"""Everything that defines a run. A recipe or a user's YAML is a partial one; the run folder keeps the resolved one."""

from typing import Literal, Self

from pydantic import Field, model_validator

from moeforge.config import Config, Count, slot
from moeforge.data.corpora import Corpus, Stdlib
from moeforge.data.tokenizers import Bytes, TokenizerConfig
from moeforge.models import ModelConfig
from moeforge.train.distill import Distill
from moeforge.train.phases import Phase


class AdamW(Config):
    """AdamW with decay on matrices only."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """First moment's memory."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Second moment's memory."""
    eps: float = Field(1e-8, gt=0)
    """Guards the division."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices; norms and biases have none."""
    clip: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""


class Cosine(Config):
    """Linear warm-up, then half a cosine down to ``final`` of the peak."""

    type: Literal["cosine"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)
    """Fraction of the steps."""
    final: float = Field(0.1, ge=0, le=1)
    """Fraction of the peak at the end."""


class WarmupStableDecay(Config):
    """Linear warm-up, a plateau, then a straight line down to ``final`` (arXiv:2404.06395, section 4)."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup: float = Field(0.05, ge=0, le=1)
    """Fraction of the steps."""
    decay: float = Field(0.2, ge=0, le=1)
    """Fraction of the steps."""
    final: float = Field(0.0, ge=0, le=1)
    """Fraction of the peak at the end."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay} are more than the whole run")
        return self


Schedule = slot(Cosine, WarmupStableDecay)


class Against(Config):
    """What a recipe is compared with, at equal steps: another recipe, or the same with some settings changed."""

    recipe: str | None = None
    """Its name; null: the recipe itself."""
    settings: tuple[str, ...] = ()
    """``--dotted.name=value``, laid on top."""
    by: Literal[
        "bits_per_byte",
        "experts_per_token",
        "load_entropy",
        "agreement",
        "flips",
        "local_share",
        "generalisation_gap",
        "worst_domain_loss",
    ] = "bits_per_byte"
    """What the claim is about. Load entropy, agreement and local share should be higher, all others lower."""
    within: float | None = Field(None, ge=0)
    """Bits per byte that it may be behind and the claim still holds: for claims of being as good, or of costing less at
    no loss. Null: it must be ahead in bits per byte, or they play no part in a claim about something else."""


class RecipeNote(Config):
    """What a recipe is evidence for."""

    title: str
    """The paper's."""
    paper: str | None = None
    """Its number in the project's list of papers."""
    arxiv: str | None = None
    """Its arXiv number."""
    claim: str
    """What the paper says, that this run can show."""
    check: str
    """How to see it here."""
    against: Against = Against(recipe="dense")
    """What ``moeforge reproduce`` compares it with."""
    differs: str | None = None
    """Where the recipe departs from the paper."""
    needs_scale: str | None = None
    """Why the claim may not show at a size that runs here, where that is known."""
    expected: str
    """What came out when we did, measured."""


class RunConfig(Config):
    """One training run."""

    name: str = "run"
    """Names the run folder, when ``--out`` does not."""
    recipe: RecipeNote | None = None
    """Set in recipes."""
    seed: int = Field(0, ge=0)
    """Of weights and data order."""
    steps: Count = Field(600, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Sequences in one micro-batch."""
    seq_len: int = Field(256, ge=2)
    """Tokens in a sequence."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches in one step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products (autocast); weights, router and losses stay float32."""
    recompute_activations: bool = False
    """Save memory by computing activations again in the backward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    eval_every: Count = Field(100, ge=1)
    """Steps between evaluations; one more comes at the end."""
    eval_tokens: Count = Field(200_000, ge=1)
    """Validation tokens of each, spread over the whole text."""
    save_every: Count = Field(500, ge=1)
    """Steps between checkpoints; one more comes at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older ones are deleted."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    model: ModelConfig = ModelConfig()
    """The decoder."""
    data: Corpus = Stdlib()
    """Where text comes from."""
    tokenizer: TokenizerConfig = Bytes()
    """How it becomes tokens."""
    optimizer: AdamW = AdamW()
    """Update rule."""
    schedule: Schedule = Cosine()
    """Learning rate over time."""
    start_from: str | None = None
    """Folder of a run or a model whose weights this run starts with; null: as ``model.init`` says."""
    distill: Distill | None = None
    """A teacher, whose next tokens this run learns beside those of the text; null: none."""
    phases: tuple[Phase, ...] = ()
    """Taken in turn, again and again, each training a part of the weights; empty: all weights, at every step."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(f"seq_len = {self.seq_len} is more than model.max_seq_len = {self.model.max_seq_len}")
        blocks = {layer.moe.token_block or 1 for layer in self.model.all_layers if layer.moe}
        if self.distill and not self.distill.acts(0, self.steps):
            raise ValueError(f"distill.until = {self.distill.until} of {self.steps} steps is none of them")
        uneven = [block for block in blocks if self.seq_len % block]
        if uneven:
            raise ValueError(f"seq_len = {self.seq_len} cannot be cut into blocks of moe.token_block = {uneven[0]}")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.seq_len * self.accumulate
