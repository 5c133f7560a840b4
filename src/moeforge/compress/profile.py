"""What calibration saw of every expert: one streaming pass over a text, the numbers that all plans are made from."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moeforge.compress.rounding import to_format
from moeforge.compress.rows import FLOOR, ROWS, Watch, tokens_of
from moeforge.compress.source import Source
from moeforge.compress.stream import Tell, silent
from moeforge.compress.threshold import estimate
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.folder import read_tensors
from moeforge.hub.store import Format
from moeforge.hub.whole import write_whole
from moeforge.kernels.activation import activate
from moeforge.kernels.allocator import return_freed_memory
from moeforge.moe import Routing
from moeforge.moe.bank.mlp import MLPBank
from moeforge.moe.route import Route

FORMATS = (
    *(Format(8, 128), Format(4, 32), Format(4, 128), Format(3, 32), Format(3, 128)),
    *(Format(2, 32), Format(2, 128), Format("ternary", 128), Format("coded", None)),
)
"""What every expert's error is measured in."""


TOGETHER = 4096
"""Tokens that an expert runs at once, and the first ones, of which all experts' outputs are compared."""


@dataclass
class Seen:
    """Of the E experts of one layer; T tokens. All float32, on the CPU."""

    count: Tensor
    """[E] tokens."""
    weight: Tensor
    """[E] sum of combine weights."""
    weight_square: Tensor
    """[E] sum of their squares."""
    reap: Tensor
    """[E] mean over its tokens of weight times norm of its output (REAP, arXiv:2510.13999)."""
    error: Tensor
    """[E, formats] mean over its tokens of the squared output error."""
    input_moment: Tensor
    """[E, D] mean square of each input channel."""
    hidden_moment: Tensor
    """[E, H] mean square of each hidden channel; H of the widest bank."""
    correlation: Tensor
    """[E, E] of router logits; 0 where the router has none, or tells none."""
    together: Tensor
    """[E, E] tokens that two experts share."""
    joint: Tensor
    """[E, E] mean over tokens of the inner product of two experts' weighted outputs, 0 where they don't meet: dropping
    a set adds to the layer's squared error the sum over its pairs. Of up to 4,096 tokens, and inside a bank."""
    router_norm: Tensor
    """[E] norm of the router's row; 0 where it has no rows."""
    hint: Tensor
    """[E] sum over its weights of their size times the norm, over its tokens, of what they read times combine weights
    (after MoE-Pruner, arXiv:2410.12013)."""
    ratio: Tensor
    """[101] of tokens' choices after their first, the score as a share of the first one's: the smallest, those that 1,
    2, ... percent are under, the largest. Scores as they are compared, logits by their exponentials; zeros where tokens
    have one choice, and for a model of transformers."""
    energy: Tensor
    """[] mean square norm of the residual stream after the layer."""
    next_together: Tensor
    """[E, E'] tokens by expert here and in the next layer with experts; empty for the last."""
    predicted: Tensor
    """[] share of this layer's choices that its router makes already from the stream before its attention; 0 for a
    model of transformers, whose layers are not taken apart."""


@dataclass
class Profile:
    """By layer with experts, and where it came from."""

    layers: dict[int, Seen]
    about: dict[str, Any] = field(default_factory=dict)
    """``tokens`` of the calibration text, ``source``: the model's folder."""

    @property
    def scarce(self) -> dict[int, list[int]]:
        """By layer, experts with too few tokens for statistics of their own; layers without any are left out."""
        few = {layer: (seen.count < FLOOR).nonzero().flatten().tolist() for layer, seen in self.layers.items()}
        return {layer: experts for layer, experts in few.items() if experts}

    @property
    def fingerprint(self) -> str:
        """Of all numbers."""
        found = hashlib.sha256()
        for layer, seen in sorted(self.layers.items()):
            for name, tensor in vars(seen).items():
                found.update(f"{layer}.{name}".encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        """``profile.safetensors`` and ``profile.json``, whole or not at all. Raises UserError."""

        def fill(fresh: Path) -> None:
            tensors = {
                f"{layer}.{k}": v.contiguous() for layer, seen in self.layers.items() for k, v in vars(seen).items()
            }
            save_file(tensors, fresh / "profile.safetensors")
            about = {**self.about, "formats": [list(format) for format in FORMATS], "scarce": self.scarce}
            (fresh / "profile.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

        write_whole(folder, fill)

    @classmethod
    def load(cls, folder: Path) -> "Profile":
        """What ``save`` wrote. Raises UserError for anything else."""
        tensors = read_tensors(folder / "profile.safetensors")
        try:
            about = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
            layers: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                layer, _, what = name.partition(".")
                layers.setdefault(int(layer), {})[what] = tensor
            wanted = {part.name for part in fields(Seen)}
            if about.pop("formats") != [list(format) for format in FORMATS] or any(
                seen.keys() != wanted for seen in layers.values()
            ):
                again = "move it away, and the command that reads it makes a new one in its place"
                raise UserError(f"{folder} is the profile of another version of moeforge: {again}")
            about.pop("scarce")
            return cls({layer: Seen(**seen) for layer, seen in sorted(layers.items())}, about)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no profile: {error}") from error

    def check(self, streamed: Source) -> None:
        """Raises UserError unless it was made of this model."""
        wanted = {index: layer.moe.num_experts for index, layer in enumerate(streamed.config.all_layers) if layer.moe}
        found = {layer: len(seen.count) for layer, seen in self.layers.items()}
        if wanted != found:
            raise UserError(f"the profile is of another model: it has experts {found}, {streamed.folder} has {wanted}")


def mask_of(route: Route) -> Tensor:
    """[T, E] float32: 1 where the token goes to the expert."""
    mask_TE = torch.zeros(route.num_tokens, route.num_experts)
    mask_TE[route.token, route.expert] = 1.0
    return mask_TE


@torch.no_grad()
def profile(streamed: Source, batches: list[Batch], tell: Tell = silent) -> Profile:
    """One pass over ``batches``; ``tell(layer)`` is called after each layer.

    Raises UserError where experts are no banks of MLPs, or the text is too short to say anything.
    """
    config, text = streamed.config, streamed.text(batches)
    if text.num_tokens < FLOOR * max(layer.moe.num_experts for layer in config.all_layers if layer.moe):
        raise UserError(f"{text.num_tokens} tokens are too few: a profile needs {FLOOR} for each expert of a layer")
    layers: dict[int, Seen] = {}
    before_TE: Tensor | None = None
    for index in range(config.num_layers):
        block: Any = streamed.block(index)
        if block.moe is None:
            text.pass_layer(block)
        else:
            seen, mask_TE = _see_layer(block, text)
            if before_TE is not None:
                last = max(layers)
                layers[last].next_together = before_TE.T @ mask_TE
            layers[index], before_TE = seen, mask_TE
        del block  # before there is the next one
        return_freed_memory()
        tell(index)
    about = {"tokens": text.num_tokens, "source": str(streamed.folder)}
    return Profile(layers, about)


def _see_layer(block: Any, text: Any) -> tuple[Seen, Tensor]:
    banks: list[Any] = list(block.moe.banks)
    if not all(isinstance(bank, MLPBank) for bank in banks):
        raise UserError("only experts that are MLPs with matrices of their own can be profiled")
    router, num_experts = block.moe.router, sum(len(bank.down_proj) for bank in banks)
    early = [mask_of(routing.route) for routing in text.early(block) if isinstance(routing.route, Route)]
    decisions = _Decisions(router, num_experts)  # of all that it says, what is needed: a text may have many tokens
    watches = [Watch(bank) for bank in banks]
    hook = router.register_forward_hook(lambda module, inputs, output: decisions.add(output))
    try:
        text.pass_layer(block)
    finally:
        for one in (hook, *(watch.hook for watch in watches)):
            one.remove()
    return_freed_memory()  # glibc keeps it otherwise, and experts ask for other sizes
    reads = [watch.done() for watch in watches]
    mask_TE = torch.cat([mask_of(read.route) for read in reads], 1)
    parts = [_of_bank(bank, read.rows, read.route) for bank, read in zip(banks, reads, strict=True)]
    energy = sum(float(x.float().square().sum()) for x in text.x) / text.num_tokens
    named = [getattr(router.gate, "weight", None)] if hasattr(router, "gate") else [*router.parameters()]
    rows = [
        weight for weight in named if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == num_experts
    ]
    norm = rows[0].float().norm(dim=1) if len(rows) == 1 else torch.zeros(num_experts)
    widest = max(part["hidden_moment"].shape[1] for part in parts)
    for part in parts:
        part["hidden_moment"] = torch.nn.functional.pad(
            part["hidden_moment"], (0, widest - part["hidden_moment"].shape[1])
        )
    joint = torch.block_diag(*(part.pop("joint") for part in parts))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    together = {
        "together": mask_TE.T @ mask_TE,
        "joint": joint,
        "correlation": _correlation(decisions.logits, num_experts),
        "router_norm": norm.detach(),
        "ratio": _percentiles(torch.cat([torch.zeros(0), *decisions.ratios])),
    }
    foreseen = (mask_TE * torch.cat(early)).sum() / mask_TE.sum() if early else torch.zeros(())
    facts = {"energy": torch.tensor(energy), "predicted": foreseen}
    return Seen(**joined, **together, **facts, next_together=torch.zeros(0)), mask_TE


class _Decisions:
    """By which logits tokens go where, batch by batch."""

    def __init__(self, router: Any, num_experts: int) -> None:
        self.router, self.num_experts = router, num_experts
        self.logits: list[Tensor | None] = []
        self.ratios: list[Tensor] = []

    def add(self, output: Any) -> None:
        """Of one batch; transformers' routers tell logits first, as far as they tell them."""
        if not isinstance(output, Routing):
            told = output if isinstance(output, tuple | list) else [output]
            logits = (some for some in told if isinstance(some, Tensor) and some.is_floating_point())
            self.logits.append(
                next((some.flatten(0, -2) for some in logits if some.shape[-1] == self.num_experts), None)
            )
            return
        route = output.route
        if isinstance(route, Route) and output.scores is not None and output.scores.shape[1] == route.num_experts:
            self.ratios.append(self._ratios(output.scores, route))
        self.logits.append(output.logits)

    def _ratios(self, scores_TE: Tensor, route: Route) -> Tensor:
        """Of every choice but each token's first."""
        if self.router.expert_bias is not None:
            scores_TE = scores_TE + self.router.expert_bias
        score_N = scores_TE[route.token, route.expert]
        best_T = torch.full((route.num_tokens,), -torch.inf).scatter_reduce(0, route.token, score_N, "amax")
        best_N = best_T[route.token]
        logits = self.router.config.score.type == "logits"
        ratio_N = (score_N - best_N).exp() if logits else score_N / best_N
        return ratio_N.sort().values[: len(ratio_N) - int((best_T > -torch.inf).sum())]  # the firsts are all one


def _percentiles(values: Tensor) -> Tensor:
    """[101] from the least to the largest."""
    if not len(values):
        return torch.zeros(101)
    return values.sort().values[torch.linspace(0, len(values) - 1, 101).round().long()]


def _correlation(logits: list[Tensor | None], num_experts: int) -> Tensor:
    known = [some_TE.float() for some_TE in logits if some_TE is not None]
    if len(known) < max(1, len(logits)):
        return torch.zeros(num_experts, num_experts)
    return torch.corrcoef(torch.cat(known).T).nan_to_num(0.0)


def _of_bank(bank: MLPBank, rows_TD: Tensor, route: Route) -> dict[str, Tensor]:
    """What one bank's experts did with their rows."""
    up_EHD, down_EDH, activation = bank.gate_up_proj.detach(), bank.down_proj.detach(), bank.config.activation
    if bank.config.bias or bank.config.clamp:
        raise UserError("experts with biases or limits stay as they are: they cannot be profiled")
    kept: dict[str, list[Tensor]] = {"reap": [], "hint": [], "error": [], "input_moment": [], "hidden_moment": []}
    for expert in range(len(up_EHD)):
        token_N, weight_N = tokens_of(route, expert)
        matrices, total = (up_EHD[expert], down_EDH[expert]), len(token_N)
        reap, squares = torch.zeros(()), [torch.zeros(2, matrix.shape[1]) for matrix in matrices]
        for at in range(0, total, TOGETHER):  # some experts have nearly all tokens
            own, weights = rows_TD[token_N[at : at + TOGETHER]], weight_N[at : at + TOGETHER]
            hidden = activate(own @ matrices[0].T, activation)
            reap += weights @ (hidden @ matrices[1].T).float().norm(dim=1)
            counted = torch.stack([torch.ones_like(weights), weights.square()])
            for square, read in zip(squares, (own, hidden), strict=True):
                square += counted @ read.float().square()
        moments = squares[0][0] / total, squares[1][0] / total
        hints = [matrix.float().abs() @ (s[1] / total).sqrt() for matrix, s in zip(matrices, squares, strict=True)]
        kept["reap"].append(reap / total)
        kept["hint"].append(torch.cat(hints).sum() * route.counts[expert].sqrt())
        kept["input_moment"].append(moments[0])
        kept["hidden_moment"].append(moments[1])
        some = torch.linspace(0, total - 1, min(ROWS, total)).round().long()
        kept["error"].append(_errors(rows_TD[token_N[some]], matrices, moments, activation))
    counts = route.counts.float()
    weight, square = (
        torch.zeros(len(counts)).index_add(0, route.expert, value) for value in (route.weight, route.weight.square())
    )
    joined = {name: torch.stack(values) for name, values in kept.items()}
    joint = _joint(bank, rows_TD[:TOGETHER], route)
    return {"count": counts, "weight": weight, "weight_square": square, "joint": joint, **joined}


def _joint(bank: MLPBank, rows_TD: Tensor, route: Route) -> Tensor:
    """``Seen.joint`` of these first tokens of a bank."""
    outputs = []
    for expert, (up_HD, down_DH) in enumerate(zip(bank.gate_up_proj.detach(), bank.down_proj.detach(), strict=True)):
        among = (route.expert == expert) & (route.token < len(rows_TD))
        hidden = activate(rows_TD[route.token[among]] @ up_HD.T, bank.config.activation)
        outputs.append((route.token[among], route.weight[among, None] * (hidden @ down_DH.T).float()))
    joint = torch.zeros(len(outputs), len(outputs))
    for start in range(0, len(rows_TD), 128):  # all experts' outputs of a few tokens, side by side
        side_ETD = torch.zeros(len(outputs), 128, rows_TD.shape[1])
        for expert, (token_N, output_ND) in enumerate(outputs):
            here = (token_N >= start) & (token_N < start + 128)
            side_ETD[expert, token_N[here] - start] = output_ND[here]
        joint += side_ETD.flatten(1) @ side_ETD.flatten(1).T
    return joint / len(rows_TD)


def _errors(
    rows_ND: Tensor, matrices: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor], activation: Any
) -> Tensor:
    """[formats] mean squared error of the expert's output in each format."""

    def run(up_HD: Tensor, down_DH: Tensor) -> Tensor:
        return activate(rows_ND.float() @ up_HD.T, activation) @ down_DH.T

    exact_ND, found = run(*(matrix.float() for matrix in matrices)), []
    for format in FORMATS:
        rounded = [_rounded(matrix, format, moment) for matrix, moment in zip(matrices, moments, strict=True)]
        found.append((run(*rounded) - exact_ND).square().sum(1).mean())
    return torch.stack(found)


def _rounded(matrix: Tensor, format: Format, moment: Tensor) -> Tensor:
    """[out, in] float32: to nearest."""
    if format.bits == "coded":
        return estimate(matrix.float(), moment)
    part = to_format(matrix[None], format, moment[None])
    return part.float()[0] if isinstance(part, Tensor) else part.dequantise()[0]
