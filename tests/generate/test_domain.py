"""Writing and reading with a model that routes by domain: which names it takes, and that they count."""

import pytest
import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import Sampling, generate, trace
from moeforge.models import Decoder, ModelConfig
from tests.generate.conftest import SHAPE

GREEDY = Sampling(temperature=0, max_tokens=6)


@pytest.fixture
def by_domain() -> Decoder:
    router = {"gate": {"type": "lookup", "by": "domain", "num_ids": 2}, "losses": []}
    changes = {
        "moe": {"experts": {"num_experts": 4, "d_expert": 8}, "router": router},
        "domains": ["code", "topics"],
        "init": {"type": "normal", "std": 0.3},
    }
    torch.manual_seed(1)
    model = Decoder(ModelConfig.model_validate(SHAPE | changes)).eval()
    with torch.no_grad():
        for moe in model.moe_layers.values():
            moe.router.gate.table.copy_(torch.tensor([[5.0, 4.0, 0, 0], [0, 0, 5.0, 4.0]]))
    return model


@pytest.mark.parametrize(("domain", "number", "experts"), [("code", 0, [0, 1]), ("topics", 1, [2, 3])])
def test_the_named_domain_decides(
    by_domain: Decoder, tokenizer: Tokenizer, domain: str, number: int, experts: list[int]
) -> None:
    steps = generate(by_domain, tokenizer, "ab", GREEDY, domain=domain).tokens
    assert all(chosen == experts for step in steps for chosen in (step.experts or {}).values())
    assert all(
        choice.experts == experts for t in trace(by_domain, tokenizer, "ab", domain) for choice in t.choices.values()
    )
    ids = [tokenizer.eos_id, *tokenizer.encode("ab")]
    for step in steps:
        input_ids = torch.tensor([ids])
        logits = by_domain(input_ids, known={"domain": torch.full_like(input_ids, number)}).logits
        assert int(logits[0, -1].argmax()) == step.token_id
        ids.append(step.token_id)


def test_a_model_by_domain_wants_one_of_its_names(by_domain: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"routes by domain: name one with --domain\. Valid: code, topics"):
        generate(by_domain, tokenizer, "a", GREEDY)
    with pytest.raises(UserError, match=r"no domain 'topic'\. Did you mean 'topics'\? Valid: code, topics"):
        trace(by_domain, tokenizer, "a", "topic")


def test_a_model_without_domains_takes_no_name(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="this model knows no domains: leave 'code' out"):
        generate(model, tokenizer, "a", GREEDY, domain="code")


def test_a_model_of_one_domain_needs_no_name(by_domain: Decoder, tokenizer: Tokenizer) -> None:
    one = Decoder(by_domain.config.replace(domains=("code",))).eval()
    one.load_state_dict(by_domain.state_dict())
    named, silent = (generate(one, tokenizer, "ab", GREEDY, domain=name).tokens for name in ("code", None))
    assert named == silent == generate(by_domain, tokenizer, "ab", GREEDY, domain="code").tokens
