"""Experts that lie packed as ``hub/store.py`` says, as a quantisation method of transformers: what it opens itself.

``quantization_config`` of config.json has ``quant_method: moeforge`` and, by the name of each module of experts, its
formats and records. They lie in the model's own files, are mapped, and run on our kernels as they are.
"""

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeforge.errors import UserError
from moeforge.hub.interface import kernel_activation, names_of
from moeforge.hub.shards import Shards
from moeforge.hub.store import METHOD, PACKED, read_packed, tensors_of
from moeforge.kernels.activation import is_gated


class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json."""

    def __init__(self, packed_experts: dict[str, Any] | None = None, **_: Any) -> None:
        if not isinstance(packed_experts, dict):
            raise UserError(f"config.json: quantization_config.{PACKED} names no module of experts")
        self.quant_method: Any = METHOD
        self.packed_experts = packed_experts

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return {"quant_method": METHOD, PACKED: self.packed_experts}


class PackedExperts(HfQuantizer):
    """Puts the experts where a model of transformers, still without weights, has parameters for them."""

    requires_calibration = True
    is_trainable: Any = False
    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Raises UserError where they do not fit the model."""
        folder, packed = Path(kwargs["checkpoint_files"][0]).parent, self.quantization_config.packed_experts
        shards, known = Shards(folder), set(model._keys_to_ignore_on_load_unexpected or ())
        for name, parts in packed.items():
            try:
                own = name if hasattr(model, name.split(".")[0]) else name.removeprefix(f"{model.base_model_prefix}.")
                _give(model.get_submodule(own), name, parts, shards)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{folder}: the packed experts of {name} do not fit: {error!r}") from error
            known |= {re.escape(tensor) for tensor in tensors_of(name, parts)}
        model._keys_to_ignore_on_load_unexpected = known
        model.set_experts_implementation("moeforge")
        return model

    def is_serializable(self) -> Any:
        """The folder that was opened has them already."""
        return False


def _give(experts: Any, name: str, parts: list[dict[str, Any]], shards: Shards) -> None:
    activation = kernel_activation(experts)
    if activation is None:
        raise ValueError("they are no plain MLPs")
    up, down = names_of(experts)
    down_shape: tuple[int, ...] = getattr(experts, down).shape
    count, (wide, narrow) = down_shape[0], down_shape[1:][:: -1 if experts.is_transposed else 1]
    shapes = (narrow * (1 + is_gated(activation)), wide), (wide, narrow)
    found = dict(zip((up, down), read_packed(name, parts, shards, shapes), strict=True))
    if found[down].shape[0] != count:
        raise ValueError(f"{found[down].shape[0]} where the model has {count}")
    for parameter, weight in found.items():
        nn.Module.__delattr__(experts, parameter)
        setattr(experts, parameter, weight)
    experts._is_hf_initialized = True  # nothing is left that could start at random
