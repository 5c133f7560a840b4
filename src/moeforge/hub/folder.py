"""A model folder: ``config.json``, weights, ``tokenizer.json``. Written whole or not at all.

Opening one leaves no weight at its random start and drops none from the file: both fail with the names.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moeforge import __version__
from moeforge.config import Tree
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.hub.layout import plan
from moeforge.hub.pretrained import Outline, Pretrained, Settle, carry_files, check, family_of, fill, outline_of_family
from moeforge.hub.remote import CODE, carry
from moeforge.hub.shards import MAX_SHARD_SIZE, Shards, write
from moeforge.hub.store import PACKED, hold_packed
from moeforge.hub.versions import model_config
from moeforge.hub.whole import write_whole
from moeforge.models import Decoder, ModelConfig
from moeforge.models.init import without_memory
from moeforge.models.weights import check_whole

MODEL_TYPE = "moeforge"


class Own(Decoder):
    """A decoder that was opened from a folder of our own type."""

    def __init__(self, config: ModelConfig, fields: Tree, folder: Path) -> None:
        """``fields`` are those of the ``config.json`` in ``folder``."""
        super().__init__(config)
        self.fields, self.folder = fields, folder

    def save_pretrained(
        self, folder: str | Path, max_shard_size: int | str = MAX_SHARD_SIZE, tokenizer: Tokenizer | None = None
    ) -> None:
        """Writes a folder of our own type with what lay beside the weights, tokenizer and generation config among it,
        and safetensors of at most ``max_shard_size`` bytes each (``"5GB"`` is understood).

        ``tokenizer`` is for a folder that came without one. Raises UserError when it cannot be written.
        """

        def beside(fresh: Path) -> None:
            carry_files(self.folder, fresh)
            if tokenizer is not None and not (fresh / "tokenizer.json").exists():
                tokenizer.save(fresh)

        _write_own(self, Path(folder), self.fields, beside, max_shard_size)


def save(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model folder; weights in the type they have. What was opened from a folder goes home to one of the
    same kind."""
    if isinstance(model, Pretrained | Own):
        return model.save_pretrained(folder, tokenizer=tokenizer)
    _write_own(model, folder, {"eos_token_id": tokenizer.eos_token_id}, tokenizer.save)


def _write_own(
    model: Decoder,
    folder: Path,
    fields: Tree,
    beside: Callable[[Path], None],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """A folder of our own type: ``fields`` go into its config.json too, ``beside`` writes what else lies there."""
    check_whole(model)
    tensors = model.state_dict()

    def contents(fresh: Path) -> None:
        write(fresh, {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__, max_shard_size)
        beside(fresh)
        write_own_config(fresh, model.config, model.embedding.weight.dtype, fields)

    write_whole(folder, contents)


def write_own_config(fresh: Path, config: ModelConfig, dtype: torch.dtype, fields: Tree) -> None:
    """The config.json of a folder of our own type, ``fields`` among it, and the code that the model needs."""
    tree = {
        "model_type": MODEL_TYPE,
        **{name: value for name, value in fields.items() if name not in CODE},
        "moeforge_version": __version__,
        "dtype": str(dtype).removeprefix("torch."),
        "model": json.loads(config.model_dump_json()),
        **carry(config, fresh),
    }
    (fresh / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path, device: str = "cpu", settle: Settle | None = None) -> tuple[Decoder, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer. A run folder stands for the ``model`` inside it.

    ``settle`` may change each layer before the next is read. Raises UserError when something is missing, cut short, or
    does not fit together.
    """
    folder = model_folder(Path(folder))
    config, _ = read_config(folder)
    tokenizer = open_tokenizer(folder)
    # Public models round their vocabulary up; ours is the tokenizer's.
    ours, known = config.vocab_size or 0, tokenizer.vocab_size
    fields = config_json(folder)
    if known > ours or (known < ours and fields["model_type"] == MODEL_TYPE and PACKED not in fields):
        raise UserError(f"{folder}: the model has vocab_size {ours}, its tokenizer {known}")
    return open_model(folder, device=device, settle=settle), tokenizer


def open_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    pickle: bool = False,
    settle: Settle | None = None,
) -> Pretrained | Own:
    """``moeforge.load``: the decoder of one of our folders or of a public family's, in evaluation mode.

    ``dtype`` None: every weight in the type it has. ``pickle`` lets ``pytorch_model.bin`` be opened. At most the model
    and one mapped file of weights are in memory. ``settle`` as ``load`` has it. Raises UserError as ``hub.load`` does.
    """
    found = outline(folder, pickle)
    fill(found.model, found.pieces, found.shards, found.unused, dtype, device, settle)
    assert isinstance(found.model, Pretrained | Own)
    return found.model.eval()


def outline(folder: str | Path, pickle: bool = False) -> Outline:
    """``open_model`` without the weights; experts that lie packed are there, mapped. Raises UserError as it does."""
    folder = model_folder(Path(folder))
    fields = config_json(folder)
    if fields["model_type"] != MODEL_TYPE:
        return outline_of_family(folder, fields, pickle)
    config, _ = read_config(folder)
    with without_memory():
        model = Own(config, fields, folder)
    shards = Shards(folder, pickle)
    packed = hold_packed(model, fields.get(PACKED, {}), shards)
    return Outline(model, plan(model, None), shards, packed)


def model_folder(folder: Path) -> Path:
    """The model folder inside a run folder, or the folder itself."""
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def read_config(folder: str | Path) -> tuple[ModelConfig, int]:
    """The model's config and the bytes of one weight, without its weights. Raises UserError as ``load`` does."""
    folder = model_folder(Path(folder))
    return understand(config_json(folder), folder)


def understand(tree: Tree, folder: Path) -> tuple[ModelConfig, int]:
    """``read_config`` of what ``config_json`` read in ``folder``."""
    path = folder / "config.json"
    name = tree.get("dtype") or tree.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{path}: dtype {name!r} is none that torch knows")
    if tree["model_type"] == MODEL_TYPE:
        return model_config(tree, source=str(path)), dtype.itemsize
    return family_of(tree, folder).read(tree, str(path)), dtype.itemsize


def config_json(folder: Path) -> Tree:
    """The fields of a folder's config.json, ``model_type`` among them. Raises UserError as ``load`` does."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    tree = _read_json(path)
    if not isinstance(tree.get("model_type"), str):
        raise UserError(f"{path} names no model_type: it is no model's config")
    return tree


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, with every token that ends its texts. Raises UserError as ``load`` does."""
    return Tokenizer.open(folder, _end_ids(folder))


def _end_ids(folder: Path) -> list[int]:
    """Tokens by which the model ends a text, none or several: as generation_config.json says, else config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        ends = _read_json(path).get("eos_token_id") if path.exists() else None
        if ends is not None:
            found = ends if isinstance(ends, list) else [ends]
            if not all(type(end) is int for end in found):
                raise UserError(f"{path}: eos_token_id = {ends!r} is neither a token's id nor a list of them")
            return found
    return []


def _read_json(path: Path) -> Tree:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return tree if isinstance(tree, dict) else {}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is missing or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error})") from error


def fit(model: Decoder, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Raises UserError with the names unless ``tensors`` are exactly the model's, in name and shape."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check(wanted, {name: tensor.shape for name, tensor in tensors.items()}, source)
