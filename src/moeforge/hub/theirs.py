"""A model of transformers whose family has no table here, called as our decoder is: what evaluates and compresses ours
does so to it."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.bridge import open_bridged
from moeforge.hub.families import FAMILIES
from moeforge.hub.folder import MODEL_TYPE, config_json, load, model_folder, open_tokenizer
from moeforge.hub.interface import is_experts, kernel_activation, layer_of, matrices_of
from moeforge.models import Decoder, ModelConfig
from moeforge.models.decoder import Output
from moeforge.moe.bank.mlp import MLPExperts

COUNTED = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
"""What families call the number of experts."""
CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
    *("num_selected_experts", "experts_per_token"),
)
"""What families call the number of a token's experts."""
GROUPS = ("n_group", "num_expert_group", "n_groups")
"""What they call the number of groups, in the best of which experts are chosen."""


class Theirs(nn.Module):
    """Any causal language model that ``open_bridged`` opens, in evaluation mode."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError as ``open_bridged`` does, and where one layer has several stacks of experts."""
        super().__init__()
        self.folder = model_folder(Path(folder))
        self.model, self.how = open_bridged(self.folder)
        stacks: dict[str, Any] = {name: module for name, module in self.model.named_modules() if is_experts(module)}
        self.names = {number: name for name in stacks if (number := layer_of(name)) is not None}
        """Of each layer's module of experts, by its number."""
        if len(self.names) < len(stacks):
            raise UserError(f"{folder}: its experts are not one stack in each layer: {', '.join(stacks)}")
        self.config = _picture(self.model, {layer: stacks[name] for layer, name in self.names.items()})

    @property
    def experts(self) -> dict[int, Any]:
        """transformers' module of experts, by layer."""
        return {layer: self.model.get_submodule(name) for layer, name in self.names.items()}

    def counted(self) -> str:
        """The field of config.json with the number of experts. Raises UserError where there is not the one."""
        count = {experts.num_experts for experts in self.experts.values()}
        for fields in (config_json(self.folder), self.model.config.to_dict()):  # a default may be left out of the file
            named = [name for name in COUNTED if {fields.get(name)} == count]
            if len(named) == 1:
                return named[0]
        said = " or ".join(map(str, sorted(count)))
        raise UserError(f"{self.folder}: config.json does not tell in one field that there are {said} experts")

    @property
    def embedding(self) -> Any:
        """Of tokens."""
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, position: Tensor | None = None, **_: Any) -> Output:
        """[B, L] ids -> logits, and the experts that tokens took. Where positions start anew a new text does, as far as
        transformers' attention keeps such texts apart."""
        taken: dict[int, tuple[Tensor, Tensor]] = {}

        def note(layer: int, experts: Any, inputs: tuple[Any, ...]) -> None:
            taken[layer] = inputs[1], inputs[1].flatten().bincount(minlength=experts.num_experts).cumsum(0)

        hooks = [experts.register_forward_pre_hook(partial(note, layer)) for layer, experts in self.experts.items()]
        try:
            found = self.model(input_ids=input_ids, position_ids=position, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return Output(found.logits, {}, taken=taken)


def is_theirs(folder: Path) -> bool:
    """Whether the folder is of a family without a table."""
    return config_json(model_folder(folder))["model_type"] not in (MODEL_TYPE, *FAMILIES)


def _picture(model: Any, experts: dict[int, Any]) -> ModelConfig:
    """What verbs ask a config: sizes, and by layer its experts. Those that are no plain MLPs show as ones with biases,
    which stay as they are wherever ours do."""
    config = model.config.get_text_config()
    table = model.get_input_embeddings().weight
    sizes = {"vocab_size": table.shape[0], "d_model": table.shape[1], "num_heads": 1, "d_ff": 1}
    sizes |= {
        "num_layers": int(config.num_hidden_layers),
        "max_seq_len": int(getattr(config, "max_position_embeddings", None) or 4096),
    }
    layers = {}
    for layer, module in experts.items():
        activation = kernel_activation(module)
        shown: dict[str, Any] = {"num_experts": module.num_experts, "d_expert": 1, "bias": True}
        if activation is not None:
            shown |= {"d_expert": matrices_of(module)[1].shape[2], "bias": False, "activation": activation}
        select = _choice(config, module.num_experts)
        layers[layer] = {"moe": {"experts": MLPExperts.model_validate(shown), "router": {"select": select}}}
    return ModelConfig.model_validate({**sizes, "layers": layers})


def _choice(config: Any, num_experts: int) -> dict[str, int]:
    """How many experts a token has, and among which groups."""
    k, groups, top = (
        next((found for name in names if isinstance(found := getattr(config, name, None), int)), 1)
        for names in (CHOSEN, GROUPS, ("topk_group",))
    )
    grouped = {"num_groups": groups, "top_groups": top}
    fits = top < groups and num_experts % groups == 0 and k <= num_experts // groups * top
    return {"k": min(k, num_experts)} | (grouped if fits else {})


def load_any(folder: Path) -> tuple[Decoder | Theirs, Tokenizer]:
    """``hub.load``, and models of transformers without a table. Raises UserError as that does."""
    if not is_theirs(folder):
        return load(folder)
    model, tokenizer = Theirs(folder), open_tokenizer(model_folder(folder))
    ours, known = model.config.vocab_size or 0, tokenizer.vocab_size
    if known > ours:
        raise UserError(f"{folder}: the model has vocab_size {ours}, its tokenizer {known}")
    return model, tokenizer
