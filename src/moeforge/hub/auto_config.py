"""Our config as transformers' ``AutoConfig`` gives it: the fields of ``config.json``, and the names others ask for."""

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moeforge.hub.versions import model_config
from moeforge.models.config import ModelConfig


class MoeforgeConfig(PreTrainedConfig):
    """``model`` holds the decoder's settings, as ``moeforge train`` takes them; everything about its shape is there.

    Text starts with the end-of-document token and padding is masked, so both are that token unless set; of
    several, the first.
    """

    model_type = "moeforge"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "router_logits", "aux_loss"]

    model: dict[str, Any] | None = None
    moeforge_version: str | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Raises UserError for settings of the decoder that it does not know, or that cannot be together."""
        super().__post_init__(**kwargs)
        end = self.eos_token_id[0] if isinstance(self.eos_token_id, list) else self.eos_token_id
        self.bos_token_id = end if self.bos_token_id is None else self.bos_token_id
        self.pad_token_id = end if self.pad_token_id is None else self.pad_token_id
        _ = self.settings

    @property
    def settings(self) -> ModelConfig:
        """The settings, checked."""
        return model_config({"model": self.model, "moeforge_version": self.moeforge_version}, source="config.json")

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding."""
        return self.settings.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """After transformers has resized the embedding."""
        self.model = {**(self.model or {}), "vocab_size": size}

    @property
    def hidden_size(self) -> int:
        """``d_model``."""
        return self.settings.d_model

    @property
    def num_hidden_layers(self) -> int:
        """Layers that a token passes, so also those that a cache may have."""
        return len(self.settings.applied_layers)

    @property
    def num_attention_heads(self) -> int:
        """``num_heads``."""
        return self.settings.num_heads

    @property
    def max_position_embeddings(self) -> int:
        """``max_seq_len``."""
        return self.settings.max_seq_len

    @property
    def tie_word_embeddings(self) -> bool:
        """``tie_embeddings``."""
        return self.settings.tie_embeddings

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers does, with the code that opens the folder where moeforge is not installed."""
        if self._auto_class is None:  # else this is such code itself, and transformers copies it
            self.__dict__.pop("auto_map", None)
            self.__dict__.update(import_module("moeforge.hub.remote").carry(self.settings, Path(save_directory)))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
