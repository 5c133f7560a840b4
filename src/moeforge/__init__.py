"""moeforge: build, train, inspect and run Mixture-of-Experts models on one set of parts.

Importing it makes ``experts_implementation="moeforge"``, models of type ``moeforge`` and experts that we packed known
to transformers, in whichever order they are imported, and imports neither transformers nor torch to do so.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeforge.hub.bridge import bridge as bridge
    from moeforge.hub.experts import experts as experts
    from moeforge.hub.folder import open_model as load  # noqa: F401 - not its name there

__version__ = "0.1.0"

_FROM_HUB = {"bridge": ("bridge", "bridge"), "experts": ("experts", "experts"), "load": ("folder", "open_model")}


def __getattr__(name: str) -> Any:
    """``moeforge.bridge``, ``experts`` and ``load``, fetched when first used."""
    from importlib import import_module

    if name in _FROM_HUB:
        module, attribute = _FROM_HUB[name]
        return getattr(import_module(f"moeforge.hub.{module}"), attribute)
    raise AttributeError(f"module 'moeforge' has no attribute '{name}'")


def _register_experts(registry: ModuleType) -> None:
    def forward(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        from moeforge.hub.interface import experts_forward

        return experts_forward(module, hidden_states, top_k_index, top_k_weights)

    registry.ExpertsInterface.register("moeforge", forward)


def _register_config(registry: ModuleType) -> None:
    from moeforge.hub.auto_config import MoeforgeConfig

    registry.CONFIG_MAPPING.register(MoeforgeConfig.model_type, MoeforgeConfig, exist_ok=True)


def _register_model(registry: ModuleType) -> None:
    from moeforge.hub.auto_model import MoeforgeForCausalLM

    registry.MODEL_FOR_CAUSAL_LM_MAPPING.register(MoeforgeForCausalLM.config_class, MoeforgeForCausalLM, exist_ok=True)


def _register_packed(registry: ModuleType) -> None:
    from moeforge.hub.auto_packed import PackedConfig, PackedExperts
    from moeforge.hub.store import METHOD

    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = PackedExperts


_REGISTER = {
    "transformers.integrations.moe": _register_experts,
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.quantizers.auto": _register_packed,
}
"""Modules of transformers that hold a registry -> what enters us there."""


class _RegisterOnImport:
    """Stands before the other finders of modules, and acts on these modules alone."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _REGISTER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _REGISTER[name](module)

            spec.loader.exec_module = execute_and_register
        return spec


sys.meta_path.insert(0, _RegisterOnImport)
for _name, _register in _REGISTER.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
