"""``moeforge convert``: any model that opens, as a Hugging Face folder or a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeforge.errors import UserError

if TYPE_CHECKING:
    import torch

    from moeforge.data.tokenizers import Tokenizer
    from moeforge.models import Decoder

TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model folder, a file of llama2.c, or a checkpoint of DeepSpeed.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder, or the .gguf file, to write.")],
    *,
    to: Annotated[Literal["hf", "gguf"] | None, typer.Option(help="What to write.", show_default="by DST")] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Of the weights.", show_default="as they are")
    ] = None,
    experts: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Pack them as compressed-tensors do, W8A16 or W4A16 in groups of 128: for vLLM."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Open what was written, and compare.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over DST.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Where a llama2.c file's is not beside it.")] = None,
    pickle: Annotated[bool, typer.Option("--pickle", help="Open pickles, letting them build tensors only.")] = False,
) -> None:
    """Write a model as a Hugging Face folder of its family, or as a GGUF file for llama.cpp.

    What is written is whole or not there: with --verify, only if it opens again with the same weights and logits.
    """
    import torch

    as_gguf = to == "gguf" or (to is None and target.suffix == ".gguf")
    if target.exists() and not force:
        raise UserError(f"{target} exists: name another, or add --force to write over it")
    if target.exists() and target.is_dir() == as_gguf:
        raise UserError(f"{target} is a {'folder' if as_gguf else 'file'}, and would become the other: remove it first")
    if experts and (as_gguf or dtype not in (None, "bf16")):
        raise UserError("--experts packs those of a Hugging Face folder in bf16: leave --dtype and GGUF out")
    wanted = getattr(torch, TYPES[dtype]) if dtype else torch.bfloat16 if experts else None
    model, words = _open(source, wanted, tokenizer, pickle)
    if experts:
        _write_packed(model, words, target, 8 if experts == "int8" else 4)
    elif as_gguf:
        _write_gguf(model, words, source, target, verify)
    else:
        _write_folder(model, words, target, verify)


def _open(
    source: Path, dtype: "torch.dtype | None", tokenizer: Path | None, pickle: bool
) -> "tuple[Decoder, Tokenizer | None]":
    """The model in ``dtype``, and its tokenizer where it has one."""
    from moeforge.hub import deepspeed, llama2c, open_model
    from moeforge.hub.folder import model_folder, open_tokenizer

    if source.is_file():
        if pickle:
            raise UserError(f"{source} is no pickle: leave --pickle out")
        return llama2c.load(source, tokenizer, dtype)
    if tokenizer is not None:
        raise UserError("--tokenizer is for files of llama2.c; a folder has its own")
    if deepspeed.states_folder(source):
        if not pickle:
            raise UserError(f"{source} is a checkpoint of DeepSpeed, in pickles: if you trust them, add --pickle")
        model = deepspeed.load(source, dtype)
        return model, open_tokenizer(source) if (source / "tokenizer.json").exists() else None
    folder = model_folder(source)
    model = open_model(folder, dtype=dtype, pickle=pickle)
    return model, open_tokenizer(folder) if (folder / "tokenizer.json").exists() else None


def _write_folder(model: "Decoder", words: "Tokenizer | None", target: Path, verified: bool) -> None:
    """A folder of the model's family; of the first that can say all of it; or of our own type."""
    from moeforge.hub import save
    from moeforge.hub.folder import MODEL_TYPE
    from moeforge.hub.pretrained import Pretrained, contents, family_that_fits
    from moeforge.hub.verify import verify
    from moeforge.hub.whole import write_whole

    origin = model.origin if isinstance(model, Pretrained) else None
    family = origin.family if origin else family_that_fits(model.config)
    found = ""

    def fill(fresh: Path) -> None:
        nonlocal found
        if family is not None:
            contents(model, target.name, family, origin, words)(fresh)
        else:
            if words is None:
                raise UserError("a folder of our own type needs a tokenizer: put a tokenizer.json beside config.json")
            save(model, words, fresh)
        if verified:
            found = f"; {verify(fresh, model)}"

    write_whole(target, fill)
    print(f"{target}: {family.model_type if family else MODEL_TYPE}, {_size(model)}{found}")


def _write_packed(model: "Decoder", words: "Tokenizer | None", target: Path, bits: int) -> None:
    """A folder of the model's family with packed experts, opened again before it takes its place."""
    from moeforge.hub.packed import pack_experts
    from moeforge.hub.pretrained import Pretrained, contents, family_that_fits
    from moeforge.hub.verify import check_opens_packed, verify
    from moeforge.hub.whole import write_whole

    check_opens_packed()
    origin = model.origin if isinstance(model, Pretrained) else None
    family = origin.family if origin else family_that_fits(model.config)
    if family is None or not family.in_transformers:
        raise UserError("--experts writes folders for transformers, which has no class for this model")
    packed, found = pack_experts(model, family.names, bits), ""

    def fill(fresh: Path) -> None:
        nonlocal found
        contents(model, target.name, family, origin, words, experts=packed)(fresh)
        found = verify(fresh, model)

    write_whole(target, fill)
    size = sum(tensor.nbytes for tensor in packed.tensors.values())
    print(f"{target}: {family.model_type}, experts in {bits} bits ({size:,} bytes), {_size(model)}; {found}")


def _write_gguf(model: "Decoder", words: "Tokenizer | None", source: Path, target: Path, verified: bool) -> None:
    from moeforge.data.tokenizers import Tokenizer
    from moeforge.hub import gguf

    words = words or Tokenizer.open(source)
    architecture = gguf.save(model, words, target, verified)
    found = "; every tensor read back byte for byte" if verified else ""
    print(f"{target}: GGUF {architecture}, {_size(model)}{found}")


def _size(model: "Decoder") -> str:
    count = sum(weight.numel() for weight in model.parameters())
    return f"{count:,} parameters in {str(model.embedding.weight.dtype).removeprefix('torch.')}"
