"""Two published attacks of one user on another through shared routing: they work on modes that compare tokens, which
have to be allowed by name, and find nothing in the default one.

Buffer overflow (arXiv:2402.05526): an attacker's tokens fill an expert's room, so that a victim's are left out.
Stealing prompts (arXiv:2410.22884): with expert choice, which of the attacker's own tokens are taken says what the
victim's token beside them was. The attacker has the model and its own outputs, shares a pass with one token of the
victim's, and knows those before it; candidates that would have given other outputs are crossed out. The paper's
attacker steers ties in place of reading log probabilities, and needs more queries for it.
"""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeforge.generate import Settings
from moeforge.generate.request import Request
from moeforge.generate.runner import BlockRunner
from moeforge.generate.schedule import Piece, Text
from moeforge.models import Decoder, ModelConfig
from tests.generate.driving import sampling

VOCABULARY, SECRET = 16, [11, 3, 7, 14]
ROUTERS = {
    "capacity": {"select": {"k": 1}, "capacity": [{"type": "capacity", "capacity_factor": 1.0}], "losses": []},
    "expert choice": {"select": {"type": "expert_choice", "k": 2}, "losses": []},
    "default": {"select": {"k": 2}, "losses": []},
}


def model(router: str) -> Decoder:
    torch.manual_seed(4)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    moe = {"experts": {"num_experts": 4, "d_expert": 16}, "router": ROUTERS[router]}
    return Decoder(ModelConfig.model_validate({**sizes, "moe": moe, "init": {"type": "normal", "std": 0.4}})).eval()


def text(tokens: Sequence[int], blocks: list[int]) -> Text:
    request = Request(tokens, sampling(), put=lambda event: None)
    return Text(request, [*tokens], blocks=blocks)


class Server:
    """Passes with a victim's next token and a text of the attacker's."""

    def __init__(self, router: str) -> None:
        self.model = model(router)
        self.settings = Settings(unsafe_batch_dependent=router != "default", kv_blocks=8)

    def outputs(self, victim: Sequence[int], probes: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Of each pass the logits of the victim, which the attacker does not see, and the attacker's own."""
        runner = BlockRunner(self.model, self.settings, 8)
        told = text(victim, [0, 1])
        seen = []
        for place, probe in enumerate(probes):
            mine = [Piece(text(probe, [2, 3]), 0, len(probe))] if probe else []
            passed = runner.run([*mine, Piece(told, place, place + 1)])  # who came first has the first rows
            seen.append((passed.logits[-1], passed.logits[0]))
        return seen


@pytest.mark.parametrize("router", ["capacity", "expert choice"])
def test_a_flood_changes_what_the_victim_gets(router: str) -> None:
    server = Server(router)
    alone = server.outputs(SECRET, [[]] * 4)
    floods = [[[token] * 20] * 4 for token in range(VOCABULARY)]
    changed = [flood for flood in floods if not torch.equal(server.outputs(SECRET, flood)[-1][0], alone[-1][0])]
    assert changed, "the attack works where tokens are compared"


def test_by_default_no_flood_changes_a_bit() -> None:
    server = Server("default")
    alone = server.outputs(SECRET, [[]] * 4)
    for token in range(VOCABULARY):
        beside = server.outputs(SECRET, [[token] * 20] * 4)
        assert all(torch.equal(one, other) for (one, _), (other, _) in zip(alone, beside, strict=True))


def steal(server: Server, most: int) -> tuple[list[int], list[set[int]], int]:
    """(what was recovered, the candidates left at each place, queries)."""
    draw, known, probes, left, queries = random.Random(0), list[int](), list[list[int]](), [], 0
    for _ in SECRET:
        candidates = set(range(VOCABULARY))
        for _ in range(most):
            probe = [draw.randrange(VOCABULARY) for _ in range(6)]
            queries += 1
            observed = server.outputs(SECRET, [*probes, probe])[-1][1]
            for guess in tuple(candidates):
                if not torch.equal(server.outputs([*known, guess], [*probes, probe])[-1][1], observed):
                    candidates.remove(guess)
            if len(candidates) == 1:
                break
        left.append(candidates)
        known.append(min(candidates))
        probes.append(probe)
    return known, left, queries


def test_a_prompt_is_stolen_token_by_token_from_expert_choice() -> None:
    known, left, queries = steal(Server("expert choice"), most=40)
    assert known == SECRET and [len(candidates) for candidates in left] == [1] * 4
    assert queries <= 100 * len(SECRET), "the paper's bound, of queries per token"


def test_by_default_nothing_is_learnt() -> None:
    _, left, queries = steal(Server("default"), most=3)
    assert queries == 3 * len(SECRET)
    assert [len(candidates) for candidates in left] == [VOCABULARY] * 4
