"""One pass over pieces of many texts, by a decoder whose keys and values lie in blocks."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moeforge.errors import UserError
from moeforge.generate.contrast import check_contrast, weaker
from moeforge.generate.sample import Sampling
from moeforge.generate.schedule import Piece
from moeforge.generate.settings import Settings
from moeforge.generate.trace import choices, refuse_blocks
from moeforge.kernels.apart import apart
from moeforge.kernels.paged import Rows
from moeforge.models import Decoder, ModelConfig
from moeforge.models.decoder import Blocks, Output
from moeforge.models.domain import known
from moeforge.models.fused import Whole, fuse
from moeforge.models.weights import bytes_by_class
from moeforge.moe import Route


class Passed(NamedTuple):
    """What a pass gave, piece by piece."""

    logits: list[Tensor]
    """[n, V] of each piece: of its last token, or of all its tokens where they were asked for."""
    experts: list[dict[int, list[int]]] | None
    """Of each piece's last token, by layer, heaviest first; None unless asked for."""
    counts: dict[int, Tensor]
    """[E] int64 by layer: choices of all tokens together."""
    weight_bytes: int = 0
    """Of weights, those that were read."""
    weak: dict[int, Tensor] | None = None
    """[V] by piece: what ``contrast`` compares the last token's logits with, where a request asked for it."""


class Runner(Protocol):
    """What an engine runs: our decoder, or a model of transformers."""

    max_len: int
    """Tokens of a text, those to come included."""
    vocab_size: int
    experts: dict[int, int]
    """By layer, how many there are."""

    def check(self, sampling: Sampling) -> None:
        """Raises UserError for what cannot be done here."""

    def run(self, pieces: Sequence[Piece], show_experts: bool) -> Passed:
        """Reads the pieces."""


def bytes_per_block(config: ModelConfig, itemsize: int, block_size: int) -> int:
    """Of keys and values of ``itemsize`` bytes, all layers together."""
    shapes = [layer.attention.cached(config) for layer in config.applied_layers if layer.attends]
    return itemsize * block_size * sum(heads * width for shape in shapes for heads, width in shape)


def blocks_wanted(config: ModelConfig, itemsize: int, settings: Settings) -> int:
    """Blocks of an engine. Raises UserError where they would not even hold one."""
    if settings.kv_blocks is not None:
        return settings.kv_blocks
    size = bytes_per_block(config, itemsize, settings.block_size)
    enough = settings.max_running * -(-config.max_seq_len // settings.block_size)
    count = min(enough, int(settings.kv_memory * 2**30) // max(size, 1))
    if count < 1:
        raise UserError(f"kv_memory = {settings.kv_memory} GiB holds no block: one takes {size / 2**20:.1f} MiB")
    return count


class BlockRunner:
    """Our decoder. All texts of a pass are rows of one batch, and what one row gets depends on its own text alone."""

    def __init__(self, model: Decoder, settings: Settings, blocks: int, domain: str | None = None) -> None:
        """Raises UserError where the model's routers compare tokens and no setting allows that, and as ``known``."""
        refuse_blocks(model)
        if model.cannot_write and not settings.unsafe_batch_dependent:
            raise UserError(
                f"in {', '.join(model.cannot_write)} a token's experts depend on other tokens than itself, "
                "also on those of other requests; --unsafe-batch-dependent runs it anyway"
            )
        if any(layer.moe and layer.moe.router.select.reads_importance for layer in model.config.all_layers):
            raise UserError("this model's routers go by the attention that a token gets from later ones")
        self.model, self.domain, self.block_size = model, domain, settings.block_size
        self.blocks, self._strong = blocks, Paged(model, blocks, self.block_size, domain)
        self._weak: dict[int, Paged] = {}
        self.unfused = self._strong.unfused
        self.bytes = bytes_by_class(model)
        self.experts = {number: moe.config.num_experts for number, moe in model.moe_layers.items()}
        self.vocab_size = model.config.vocab_size or 0
        self.max_len = min(model.config.max_seq_len, blocks * settings.block_size)
        known(model, domain, torch.empty(0))

    def check(self, sampling: Sampling) -> None:
        """Raises UserError for a contrast that the model's routers do not have."""
        if sampling.contrast is not None:
            check_contrast(self.model, sampling.contrast)

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece], show_experts: bool = False) -> Passed:
        """Reads the pieces in one forward pass, and those that are contrasted in a weak one as well."""
        output, sizes = self._read(self._strong, pieces)
        logits = output.logits[0].float().cpu().split(sizes)
        experts = _experts(output, pieces) if show_experts else None
        counts, weak = _counts(output), dict[int, Tensor]()
        read = self._weight_bytes(counts)
        for rank in sorted({_rank(piece) for piece in pieces} - {0}):
            chosen = [index for index, piece in enumerate(pieces) if _rank(piece) == rank]
            output, sizes = self._read(self._weak_of(rank), [pieces[index] for index in chosen])
            parts = output.logits[0].float().cpu().split(sizes)
            weak |= {index: part[-1] for index, part in zip(chosen, parts, strict=True)}
            read += self._weight_bytes(_counts(output))
        return Passed(list(logits), experts, counts, read, weak)

    def _read(self, paged: "Paged", pieces: Sequence[Piece]) -> tuple[Output, list[int]]:
        ids = torch.tensor([token for p in pieces for token in p.text.tokens[p.start : p.end]])
        rows, wanted, sizes = self._rows(pieces)
        return paged.read(ids.to(wanted.device), rows, wanted), sizes

    def _weak_of(self, rank: int) -> "Paged":
        """Made when first asked for: its keys and values take as much memory again, where they are used."""
        if rank not in self._weak:
            self._weak[rank] = Paged(weaker(self.model, rank), self.blocks, self.block_size, self.domain)
        return self._weak[rank]

    def _weight_bytes(self, counts: dict[int, Tensor]) -> int:
        """All but embeddings and experts once, and each expert that somebody chose."""
        per_expert = self.bytes["experts"] / max(1, sum(self.experts.values()))
        always = self.bytes["dense"] + self.bytes["router"] + self.bytes["other"]
        chosen = int((torch.cat([*counts.values()]) > 0).sum()) if counts else 0
        return int(always + per_expert * chosen)

    def _rows(self, pieces: Sequence[Piece]) -> tuple[Rows, Tensor, list[int]]:
        """The rows, the places whose logits are wanted, and how many of each piece."""
        size, device = self.block_size, self.model.embedding.weight.device
        longest = max(len(piece.text.blocks) for piece in pieces)
        table = [[*piece.text.blocks, *[0] * (longest - len(piece.text.blocks))] for piece in pieces]
        text, position, slot, wanted, sizes = [], [], [], [], []
        for index, piece in enumerate(pieces):
            places = range(piece.start, piece.end)
            text += [index] * len(places)
            position += places
            slot += [piece.text.blocks[at // size] * size + at % size for at in places]
            first = len(text) - (len(places) if wants_all(piece) else 1)
            wanted += range(first, len(text))
            sizes.append(len(text) - first)
        made = Rows(
            torch.tensor(text, dtype=torch.int32, device=device),
            torch.tensor(position, device=device),
            torch.tensor(table, dtype=torch.int32, device=device),
            torch.tensor(slot, device=device),
        )
        return made, torch.tensor(wanted, device=device), sizes


class Paged:
    """A decoder over blocks of its own, its layers in native calls where they can."""

    def __init__(self, model: Decoder, blocks: int, block_size: int, domain: str | None) -> None:
        self.model, self.domain = model, domain
        self.cache = Blocks(model, blocks, block_size)
        self.unfused = fuse(model, self.cache)
        fused = len(self.cache.fused) == len(model.stack) and isinstance(model.norm, nn.RMSNorm)
        self._whole = Whole(model, self.cache) if fused else None

    def read(self, ids_T: Tensor, rows: Rows, logits_of: Tensor) -> Output:
        """Tokens of any texts, whose keys and values lie where ``rows`` say."""
        if self._whole is not None:
            return self._whole(ids_T, rows, logits_of)
        self.cache.take(rows)
        facts = known(self.model, self.domain, ids_T[None])
        with apart():
            position = rows.position[None]
            return self.model(ids_T[None], position=position, cache=self.cache, known=facts, logits_of=logits_of)


def _rank(piece: Piece) -> int:
    """Of the experts that its weak pass takes; 0: it has none."""
    contrast = piece.text.request.sampling.contrast
    return 0 if contrast is None else contrast.rank


def wants_all(piece: Piece) -> bool:
    """Whether the logits of every token of the prompt are asked for, and this is a part of it."""
    request = piece.text.request
    return request.sampling.prompt_logprobs is not None and piece.start < len(request.prompt)


def _experts(output: Output, pieces: Sequence[Piece]) -> list[dict[int, list[int]]]:
    """Of the last token of each piece."""
    ends = list(accumulate(piece.end - piece.start for piece in pieces))
    by_row = choices(output, ends[-1])
    found = [{layer: choice.experts for layer, choice in by_row[end - 1].items()} for end in ends]
    for layer, (ids_TK, _) in output.taken.items():
        if ids_TK.shape[1]:
            for experts, end in zip(found, ends, strict=True):
                experts[layer] = ids_TK[end - 1].tolist()
    return found


def _counts(output: Output) -> dict[int, Tensor]:
    routes = {layer: routing.route for layer, routing in output.routings.items()}
    counts = {layer: route.counts.cpu() for layer, route in routes.items() if isinstance(route, Route)}
    taken = {layer: ends_E for layer, (_, ends_E) in output.taken.items() if len(ends_E)}
    for size in {len(ends_E) for ends_E in taken.values()}:  # all of a size at once: a pass may take milliseconds
        layers = [layer for layer, ends_E in taken.items() if len(ends_E) == size]
        ends_LE = torch.stack([taken[layer] for layer in layers]).long()
        counts |= dict(zip(layers, ends_LE.diff(dim=1, prepend=ends_LE.new_zeros(len(layers), 1)), strict=True))
    return counts
