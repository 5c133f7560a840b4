"""Typed config tree <-> YAML <-> dotted command-line overrides. Imports no torch, so every command can start with it.

A setting that chooses among mechanisms is a *slot*: a union of small frozen configs told apart by ``type``. The union
is the registry. ``select: top_p`` is short for ``select: {type: top_p}``; ``type: their_pkg.routing:TheirSelect``
names a class of somebody else's.
"""

import difflib
import importlib
import operator
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, WrapValidator

from moeforge.errors import UserError

Activation = Literal["swiglu", "geglu", "gelu", "relu", "silu"]
"""What an MLP does between its matrices. The names ending in ``glu`` are gated (two up-projections)."""

Tree = dict[str, Any]


class Config(BaseModel):
    """A frozen record of settings. Unknown keys are errors, and derived values are properties, never fields."""

    # JSON has no infinity; as null it would not come back.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        ser_json_inf_nan="strings",
    )

    def model_post_init(self, _: Any) -> None:
        """Marks ``type`` as set, so that a dump of only what was set still says which member of its slot this is."""
        if "type" in type(self).model_fields:
            self.model_fields_set.add("type")

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        fields = {name: getattr(self, name) for name in type(self).model_fields} | changes
        return type(self).model_validate({k: v.model_dump() if isinstance(v, Config) else v for k, v in fields.items()})


def slot(*members: type[Config], default: type[Config] | None = None) -> Any:
    """The annotation of a slot: a union of configs by ``type``, open to third parties by ``module:Class``.

    Settings without a ``type`` are those of ``default``, where there is one.
    """

    def resolve(value: Any, handler: Any) -> Any:
        if isinstance(value, str):
            value = {"type": value}
        if isinstance(value, Mapping) and ":" in str(value.get("type", "")):
            return _import_config(value["type"]).model_validate(value)
        if isinstance(value, Config):
            return value
        if isinstance(value, Mapping) and "type" not in value and default is not None:
            value = {"type": default.model_fields["type"].default, **value}
        return handler(value)

    union: Any = reduce(operator.or_, members)
    tagged: Any = Annotated[union, Field(discriminator="type")] if len(members) > 1 else union
    return Annotated[SerializeAsAny[tagged], WrapValidator(resolve)]


def _import_config(name: str) -> type[Config]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import '{name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, Config)):
        raise ValueError(f"'{name}' is not a moeforge.config.Config")
    return found


def _parse_count(value: Any) -> Any:
    """Reads ``25k``, ``1.5M`` and ``2B`` as whole numbers; leaves everything else to the type's own check."""
    match = re.fullmatch(r"([\d.]+)\s*([kMB])", value.strip()) if isinstance(value, str) else None
    return round(float(match[1]) * {"k": 1e3, "M": 1e6, "B": 1e9}[match[2]]) if match else value


Count = Annotated[int, BeforeValidator(_parse_count)]
"""A whole number of tokens, steps or bytes; ``50M`` is understood."""

C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file. Raises UserError when it is missing, malformed, or no mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of settings")
    return tree


def override(tree: Tree, overrides: Iterable[str]) -> Tree:
    """A copy of ``tree`` with ``--a.b.c=value`` applied in order; values are read as YAML, hyphens as underscores."""
    tree = merge({}, tree)
    for text in overrides:
        path, equals, value = text.removeprefix("--").partition("=")
        if not equals or not text.startswith("--"):
            raise UserError(f"cannot read '{text}': settings are given as --dotted.name=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"cannot read the value of '{text}': {' '.join(str(error).split())}") from error
        _assign(tree, path.replace("-", "_").split("."), parsed, text)
    return tree


def _assign(node: Any, path: list[str], value: Any, text: str) -> None:
    """Sets ``value`` at ``path`` below ``node``, making missing mappings and opening short-form slots on the way."""
    for depth, part in enumerate(path):
        key: Any = int(part) if part.isdigit() else part
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not isinstance(key, int) or key >= len(node):
                where = ".".join(path[:depth])
                raise UserError(f"'{text}': {where} is a list of {len(node)}; name one by its number, from 0")
        elif not isinstance(node, dict):
            raise UserError(f"'{text}': {'.'.join(path[:depth])} is a single value, it has no '{part}'")
        if last:
            node[key] = value
            return
        below = node[key] if isinstance(node, list) else node.get(key)
        if isinstance(below, str):
            below = {"type": below}
        node[key] = {} if below is None else below
        node = node[key]


def merge(base: Any, over: Any) -> Any:
    """``over`` laid on ``base``: mappings merge key by key, the rest replaces; a new slot ``type`` starts afresh."""
    if isinstance(base, str) and isinstance(over, Mapping):
        base = {"type": base}
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return _copy(over)
    if "type" in over and over["type"] != base.get("type", over["type"]):
        return _copy(over)
    return {
        key: merge(base.get(key), over[key]) if key in over else _copy(base[key])
        for key in [*base, *(key for key in over if key not in base)]
    }


def difference(base: Any, full: Any) -> Any:
    """The smallest mapping that ``merge`` lays on ``base`` to get ``full``."""
    if not (isinstance(base, Mapping) and isinstance(full, Mapping)) or base.get("type") != full.get("type"):
        return full
    return {
        key: difference(base.get(key), value) for key, value in full.items() if key not in base or base[key] != value
    }


def _copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list | tuple) else node


def build(cls: type[C], tree: Tree, source: str = "config") -> C:
    """``cls`` from a mapping. Raises one UserError that lists every mistake with path, choices and nearest name."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        items = error.errors(include_url=False)
        known = {_mistake(item["loc"], item) for item in items}
        lines = [_explain(cls, tree, dict(item)) for item in items if not _inherited(item, known)]
        raise UserError("\n".join([f"{source} has {len(lines)} mistake{'s' * (len(lines) > 1)}:", *lines])) from error


def _mistake(loc: tuple[Any, ...], item: Any) -> tuple[Any, ...]:
    """What makes two mistakes the same one: place, message, and the value unless it is a whole mapping."""
    return loc, item["msg"], None if isinstance(item["input"], Mapping) else repr(item["input"])


def _inherited(item: Any, known: set[tuple[Any, ...]]) -> bool:
    """Whether a mistake (say at ``layers.1.moe.x``) is one of the defaults' (at ``moe.x``), reported there."""
    loc = item["loc"]
    cuts = [cut for cut in range(len(loc) - 2) if isinstance(loc[cut + 1], int)]
    return any(_mistake(loc[:cut] + loc[cut + 2 :], item) in known for cut in cuts)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that ``build(read_yaml(...))`` turns back into an equal config."""
    return str(yaml.safe_dump(_copy(config.model_dump()), sort_keys=False, width=110))


def nearest(name: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest choice, or nothing when none is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def _explain(cls: type[Config], tree: Tree, item: Tree) -> str:
    """One line of ``build``'s message for one pydantic error."""
    path = ".".join(_shown(tree, item["loc"]))
    context, given = item.get("ctx", {}), item.get("input")
    match item["type"]:
        case "extra_forbidden":
            key, choices = str(item["loc"][-1]), _choices(cls, item["loc"][:-1], tree)
            return f"  {path} is not a setting.{nearest(key, choices)} Valid here: {', '.join(choices)}"
        case "union_tag_invalid":
            tags = re.findall(r"'([^']+)'", context["expected_tags"])
            tag = context["tag"]
            return f"  {path}: there is no type '{tag}'.{nearest(tag, tags)} Valid: {', '.join(tags)}"
        case "literal_error":
            valid = re.findall(r"'([^']+)'", context["expected"])
            return f"  {path}: '{given}' is not a choice.{nearest(str(given), valid)} Valid: {', '.join(valid)}"
        case "missing":
            return f"  {path} is missing"
        case "value_error":
            return f"  {path + ': ' if path else ''}{context['error']}"
    return f"  {path} = {given!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _shown(tree: Any, loc: tuple[Any, ...]) -> list[str]:
    """The path as the user wrote it: pydantic puts the slot's tag into the path, the user does not."""
    shown: list[str] = []
    for position, part in enumerate(loc):
        inside = (isinstance(tree, Mapping) and part in tree) or (isinstance(tree, list) and isinstance(part, int))
        if inside:
            tree = tree[part]
        elif position < len(loc) - 1 and shown:
            continue
        shown.append(str(part))
    return shown


def _choices(annotation: Any, loc: tuple[Any, ...], tree: Any) -> list[str]:
    """Names of the settings of the config found by following a pydantic error path from ``annotation`` and ``tree``."""
    if isinstance(tree, Mapping) and ":" in str(tree.get("type", "")):
        annotation = _import_config(tree["type"])
    if isinstance(annotation, type) and issubclass(annotation, Config):
        if not loc:
            return list(annotation.model_fields)
        if loc[0] in annotation.model_fields:
            below = tree.get(loc[0]) if isinstance(tree, Mapping) else None
            return _choices(annotation.model_fields[loc[0]].annotation, loc[1:], below)
        tag = annotation.model_fields.get("type")
        return _choices(annotation, loc[1:], tree) if tag is not None and tag.default == loc[0] else []
    members = [m for m in get_args(annotation) if m is not type(None)] if get_origin(annotation) is not Literal else []
    if get_origin(annotation) in (dict, list, tuple) and loc:
        key, loc = loc[0], loc[1:]
        inside = (isinstance(tree, list) and isinstance(key, int)) or (isinstance(tree, Mapping) and key in tree)
        tree = tree[key] if inside else tree
    return next((found for member in members if (found := _choices(member, loc, tree))), [])
