"""How an engine runs: how many texts at once, in which steps, with how much memory, from which weights."""

from typing import Literal

from pydantic import Field

from moeforge.config import Config, Count

Weights = Literal["as stored", "float32", "bf16", "int8", "int4"]
"""What matrices are held as: float32 and bf16 all of them, int8 and int4 none of router, norms and embeddings."""


class Settings(Config):
    """Of one engine. Whatever they say, a request gets the same tokens: they decide how soon."""

    weights: Weights = "as stored"
    """Matrices of experts, attention and dense layers; int8 and int4 are rounded while loading."""
    max_running: Count = Field(32, ge=1)
    """Texts that are written at the same time."""
    max_waiting: Count = Field(256, ge=0)
    """Requests that wait for a place; one more is refused."""
    token_budget: Count = Field(512, ge=1)
    """Tokens of one pass: those of texts that are being written first, then chunks of prompts."""
    block_size: Count = Field(16, ge=16, multiple_of=16)
    """Tokens of one block of keys and values."""
    kv_memory: float = Field(1.0, gt=0)
    """GiB for keys and values."""
    kv_blocks: Count | None = Field(None, ge=1)
    """Blocks of keys and values; null: as many as ``kv_memory`` holds, but no more than all texts could fill."""
    prefix_reuse: bool = True
    """Keep keys and values of finished texts until their memory is needed: a prompt that starts alike starts there."""
    unsafe_batch_dependent: bool = False
    """Run a model whose routers compare tokens: a request's text then depends on those it shares a pass with."""
