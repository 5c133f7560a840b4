"""``bridge``: a model of transformers on our engines, or the reason why not. The one file that imports transformers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from moeforge.errors import UserError
from moeforge.hub.interface import is_experts

REFUSED = {
    "dbrx": "its experts are slices of three flat matrices",
    "doge": "its experts are single vectors, looked up in two embeddings",
    "jetmoe": "its layers cut the rows themselves, and its attention has experts too",
    "llama4_text": "each expert gets every row, scaled by its weight before the activation instead of after the expert",
    "longcat_flash": "some of its experts are the identity",
    "nllb-moe": "each expert is a module of its own, with dropout between expert and sum",
    "step3p5": "it limits the gate after the activation, by another limit in each layer",
    "switch_transformers": "each expert is a module of its own",
    "vitpose_backbone": "its experts are parts of a matrix that the data set chooses; nothing is routed",
}
"""model_type -> why its layers do not fit the experts interface of transformers, and so do not use it."""

Model = TypeVar("Model", bound=nn.Module)

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def bridge(model: Model) -> Model:
    """Switches all experts of ``model`` to our engines, in place, and returns it.

    Raises UserError, having changed nothing, where transformers is missing, where the family does not use its experts
    interface, where the experts' weights are quantised, and where transformers leaves experts out.
    """
    if find_spec("transformers") is None:
        raise UserError("the bridge needs transformers, which is not installed: pip install 'moeforge[hf]'")
    stacks: dict[str, Any] = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not stacks:
        raise UserError(why_not(model))
    for name, module in stacks.items():
        for dtype in {weight.dtype for weight in module.parameters()}.difference(COMPUTED):
            raise UserError(f"{name} holds {dtype}: quantised experts do not run on these engines; dequantise it first")
    switchable: Any = model
    before = switchable.get_experts_implementation()
    switchable.set_experts_implementation("moeforge")
    left = [name for name, module in stacks.items() if module.config._experts_implementation != "moeforge"]
    if left:
        switchable.set_experts_implementation(before)
        raise UserError(f"transformers did not switch {left[0]} (of {len(left)}): its config is not the model's")
    return model


def why_not(model: nn.Module) -> str:
    """Why there are no experts here that could be run or shown."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    types = [kind for config in configs if (kind := getattr(config, "model_type", None))]
    for kind in types:
        if kind in REFUSED:
            return f"{kind} does not use the experts interface of transformers: {REFUSED[kind]}"
    what = f"model_type {types[0]}" if types else f"a {type(model).__name__}"
    return f"this model ({what}) has no experts that go through the experts interface of transformers"


def names_on_disk(model: Any, name: str) -> tuple[str, ...]:
    """The tensors in a checkpoint of transformers that the parameter or buffer ``name`` is joined from, in order; none
    where they cannot be told apart from those of another parameter."""
    from transformers.core_model_loading import revert_weight_conversion

    # Undone as saving would undo it, on a tensor without data.
    try:
        inside, _, last = name.rpartition(".")
        tensor = getattr(model.get_submodule(inside), last)
        return tuple(revert_weight_conversion(model, {name: tensor.to("meta")}))
    except ValueError:  # some tensors hold the experts of two stacks, and only both together give them back
        return ()


def olmoe_experts(implementation: str, up_EHD: torch.Tensor, down_EDH: torch.Tensor, top_k: int) -> nn.Module:
    """transformers' own OLMoE experts around these weights, not copied, under one of its implementations: what the
    benchmarks compare with. Called with rows, ids and weights; raises UserError where transformers is missing."""
    if find_spec("transformers") is None:
        raise UserError("transformers is not installed: pip install 'moeforge[hf]'")
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    num_experts, d_model, d_expert = down_EDH.shape
    sizes = {"hidden_size": d_model, "intermediate_size": d_expert, "num_experts_per_tok": top_k}
    config = OlmoeConfig(num_experts=num_experts, **sizes)
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = OlmoeExperts(config)
    for name, weight in (("gate_up_proj", up_EHD), ("down_proj", down_EDH)):
        delattr(experts, name)  # the parameter gives way to the very tensor, whose gradient counts
        setattr(experts, name, weight)
    return experts


def open_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers in a folder, its weights in ``dtype``, in evaluation mode.

    Raises UserError where it has weights that the folder lacks, or leaves some of the folder's.
    """
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    amiss = {what: sorted(map(str, names)) for what, names in loading.items() if names}
    if amiss:
        raise UserError(f"{type(model).__name__} does not take {folder} as it is: {amiss}")
    return model.eval()


def open_bridged(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """Any causal language model of transformers, in evaluation mode, on our engines where the bridge can; and how it
    runs, in words.

    Raises UserError where transformers is missing, or cannot open the folder.
    """
    if find_spec("transformers") is None:
        raise UserError(f"{folder} needs transformers, which is not installed: pip install 'moeforge[hf]'")
    from transformers import AutoModelForCausalLM

    try:
        wanted: Any = dtype or "auto"
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # configs are checked by many hands
        said = (str(error).strip() or repr(error)).splitlines()
        raise UserError(f"{folder}: transformers cannot open it: {said[0]} {' '.join(said[1:2]).strip()}") from error
    amiss = {what: sorted(map(str, names)) for what, names in loading.items() if names}
    if amiss:
        raise UserError(f"{type(model).__name__} does not take {folder} as it is: {amiss}")
    try:
        bridge(model)
    except UserError as error:
        return model.eval(), f"transformers' {type(model).__name__} as it is ({error})"
    _let_go(model)
    return model.eval(), f"transformers' {type(model).__name__} with our expert kernels"


def _let_go(model: nn.Module) -> None:
    """Copies what still lies in the mapped file: experts were joined from it, and it would stay in memory with them."""
    joined = {id(weight) for module in model.modules() if is_experts(module) for weight in module.parameters()}
    for weight in model.parameters():
        if id(weight) not in joined:
            weight.data = weight.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:  # a view of the file, which ``data`` would still hold
                module._buffers[name] = buffer.clone()
