"""What a family is: a table of rows for its config.json, a table of names for its tensors, and our settings besides."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeforge.config import build, merge
from moeforge.errors import UserError
from moeforge.hub.families.rows import Row, Tree
from moeforge.hub.layout import Names
from moeforge.models import LayerConfig, ModelConfig

INERT = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version _name_or_path model_type
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    _attn_implementation attn_implementation tokenizer_class torchscript use_bfloat16 pruned_heads task_specific_params
    use_cache output_router_logits router_aux_loss_coef initializer_range pretraining_tp attention_dropout
    output_hidden_states output_attentions return_dict return_dict_in_generate chunk_size_feed_forward
    id2label label2id problem_type num_labels
    max_length min_length do_sample num_beams temperature top_k top_p typical_p repetition_penalty no_repeat_ngram_size
    """.split()
)
"""Fields that no logit depends on in evaluation mode: kept as they are, whatever they say."""

TRAINING_ONLY = (
    *("moe.router.losses", "moe.router.noise", "moe.router.input_jitter", "moe.router.select.train_k"),
    *("moe.router.controller.rate", "moe.router.controller.by", "moe.experts.engine", "moe.router.gate.frozen"),
)
"""Settings that no logit depends on in evaluation mode, and that no config.json of these families holds."""
OF_AN_MLP = ("d_ff", "activation", "mlp_bias")
"""Settings of a layer that say nothing where it has experts instead."""


class Ours(Mapping[str, Any]):
    """A decoder's settings by dotted path. ``moe`` is that of the first layer with experts, ``d_ff`` that of the first
    without; ``sparse`` says of every layer whether it has experts, ``windows`` how much it sees."""

    def __init__(self, config: ModelConfig) -> None:
        layers = config.all_layers
        dense, sparse = [x for x in layers if not x.moe], [x for x in layers if x.moe]
        self._tree = config.model_dump() | (layers[0].model_dump() | {"d_ff": (dense or layers)[0].d_ff})
        self._tree["moe"] = sparse[0].moe.model_dump() if sparse and sparse[0].moe else None
        self._tree["sparse"] = [layer.moe is not None for layer in layers]
        self._tree["windows"] = [layer.window for layer in layers]

    def __getitem__(self, path: str) -> Any:
        node: Any = self._tree
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                raise KeyError(path)
            node = node[part]
        return node

    def __iter__(self) -> Any:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)


@dataclass(frozen=True)
class Family:
    """Both tables, and both directions of each."""

    model_type: str
    architecture: str
    """The class of transformers that has the language model's head."""
    rows: tuple[Row, ...]
    names: Names
    settings: Tree = field(default_factory=dict)
    """Ours that hold for the whole family, whatever its config.json says."""
    inert: frozenset[str] = frozenset()
    """Fields of this family alone that no logit depends on."""
    in_transformers: bool = True
    """Whether transformers has the class; otherwise it lies in the published folder."""
    former: str | None = None
    """What the class was called in older configs."""
    unused: str = r"(?!)"
    """Pattern of tensors that its folders may hold and that no logit depends on; ``NEXT`` stands for the numbers of
    layers beyond the last, which predict tokens further on."""

    @property
    def defaults(self) -> Tree:
        """Every field that is understood, and what stands for it where it is absent."""
        return {name: value for row in self.rows for name, value in row.defaults.items()}

    def unused_of(self, config: ModelConfig, names: Iterable[str]) -> set[str]:
        """Which of the tensors no logit depends on."""
        beyond = range(config.num_layers, config.num_layers + 16)
        pattern = re.compile(self.unused.replace("NEXT", f"({'|'.join(map(str, beyond))})"))
        return {name for name in names if pattern.fullmatch(name)}

    def read(self, theirs: Tree, source: str = "config.json") -> ModelConfig:
        """Our settings. Raises UserError that names every field that is not understood, and what cannot be done."""
        defaults = self.defaults
        unknown = sorted(theirs.keys() - defaults.keys() - INERT - self.inert)
        problems = [f"{name} = {theirs[name]!r} is not understood" for name in unknown]
        problems += [f"{name} is missing" for name, value in defaults.items() if value is ... and name not in theirs]
        classes = theirs.get("architectures") or [self.architecture]
        if classes not in ([self.architecture], [self.former]):
            problems.append(f"architectures is {classes}; what opens here is {self.architecture}")
        tree: Tree = merge({}, self.settings)
        for row in self.rows if not problems else ():
            try:
                settings = row.read(defaults | theirs)
            except ValueError as error:
                problems.append(str(error))
                continue
            except (TypeError, AttributeError, ArithmeticError) as error:  # a value of another kind than any config has
                problems.append(f"{', '.join(name for name in row.defaults if name in theirs)}: {error}")
                continue
            for path, value in settings.items():
                _put(tree, path, value)
        if problems:
            raise UserError(f"{source}, model_type {self.model_type}: " + "; ".join(problems))
        _freeze_idle_gate(tree.get("moe"))
        return build(ModelConfig, tree, source=source)

    def write(self, config: ModelConfig, base: Tree | None = None) -> Tree:
        """The fields of a config.json that ``read`` turns back into ``config``; those of ``base`` that already say it
        stay as they are. Raises UserError that names the settings which this family has no field for."""
        base = dict(base or {})
        base.setdefault("architectures", [self.architecture])
        base.setdefault("model_type", self.model_type)
        tree = base if self._says(base, config) else self._rewritten(config, base)
        return {name: value for name, value in tree.items() if name != "quantization_config"}  # ours are not quantised

    def _rewritten(self, config: ModelConfig, base: Tree) -> Tree:
        known, ours = self.defaults, Ours(config)
        try:
            fresh = {name: value for row in self.rows for name, value in row.write(ours).items()}
            # A null that says what leaving it out says: some classes take it for a value (OLMoE's of head_dim).
            kept = (name for name, value in fresh.items() if (value, known.get(name)) != (None, None) or name in base)
            fresh = {name: fresh[name] for name in kept}
            tree = {name: value for name, value in base.items() if name not in known} | fresh
            differing = differences(config, self.read(tree))
        except KeyError as error:
            raise UserError(f"the model is no {self.model_type}: it has no setting {error}") from error
        except (ValueError, TypeError, UserError) as error:
            raise UserError(f"the model is no {self.model_type}: {error}") from error
        if differing:
            raise UserError(f"the model is no {self.model_type}, which has no field for: {'; '.join(differing)}")
        for row in self.rows if base.keys() & known.keys() else ():
            rest = {name: value for name, value in tree.items() if name not in row.defaults}
            as_before = rest | {name: base[name] for name in row.defaults if name in base}
            if self._says(as_before, config):
                tree = as_before
        return {name: tree[name] for name in base if name in tree} | tree

    def _says(self, theirs: Tree, config: ModelConfig) -> bool:
        try:
            return not differences(config, self.read(theirs))
        except UserError:
            return False


def _put(tree: Any, path: str, value: Any) -> None:
    """Sets ``value`` at a dotted path; below what is null there is nothing to set."""
    *above, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in above:
        tree = tree.setdefault(part, {})
        if tree is None:
            return
    tree[last] = value


def _freeze_idle_gate(moe: Tree | None) -> None:
    """A weight normalised over one expert is always one, and no gradient reaches its gate: it opens frozen."""
    router = moe["router"] if moe else {}
    weigh = router.get("weigh")
    normalised = weigh == "softmax" or (isinstance(weigh, Mapping) and weigh.get("normalize_weights"))
    if normalised and router["select"]["k"] == 1 and not router.get("controller"):
        _put(router, "gate.frozen", True)


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """Settings that differ and that a logit depends on, as ``path = value``."""
    left, right = _for_logits(config), _for_logits(other)
    paths = sorted(left.keys() | right.keys())
    return [f"{path} = {left.get(path)!r}" for path in paths if left.get(path) != right.get(path)]


def _for_logits(config: ModelConfig) -> Tree:
    """The settings that a logit depends on by dotted path, every layer's own under its number."""
    of_layers = {*LayerConfig.model_fields, "layers", "first_dense_layers", "moe_every"}
    tree = {name: value for name, value in config.model_dump().items() if name not in of_layers | {"init"}}
    tree |= {"num_kv_heads": config.num_key_heads, "head_dim": config.size_of_head}
    for number, layer in enumerate(config.all_layers):
        flat, idle = _flat(layer.model_dump()), (*TRAINING_ONLY, *(OF_AN_MLP if layer.moe else ()))
        ours = {path for path in flat if not any(f"{path}.".startswith(f"{part}.") for part in idle)}
        tree |= {f"layers.{number}.{path}": flat[path] for path in ours}
    return _flat(tree)


def _flat(tree: Any, prefix: str = "") -> Tree:
    """Nested mappings as one, by dotted path."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    return {path: value for key, below in tree.items() for path, value in _flat(below, f"{prefix}{key}.").items()}
