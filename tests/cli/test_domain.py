"""Every verb with a model that routes by domain."""

import json
from pathlib import Path

import pytest

from moeforge.cli.analyze import read_run
from moeforge.cli.main import main
from tests.cli.conftest import SETTINGS

GATE = "router: {gate: {type: lookup, by: domain, num_ids: 2}, losses: []}"


@pytest.fixture(scope="module")
def by_domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("domains")
    for domain in ("prose", "verse"):
        (root / "text" / domain).mkdir(parents=True)
        for number in range(20):
            (root / "text" / domain / f"{number}.txt").write_text(f"{domain} number {number}\n" * 20)
    settings = SETTINGS.replace("PATH}", f"{root / 'text'}, validation_fraction: 0.4}}")
    (root / "run.yaml").write_text(settings.replace("shared: {d_expert: 8}", GATE))
    assert main(["train", str(root / "run.yaml"), "--out", str(root / "run"), "--quiet"]) == 0
    return root / "run"


def test_generate_and_chat_want_a_domain(call, by_domain: Path) -> None:
    for verb in ("generate", "chat"):
        code, _, err = call(verb, by_domain, stdin="")
        assert (code, err) == (2, "error: this model routes by domain: name one with --domain. Valid: prose, verse\n")
    given = call("generate", by_domain, "pro", "--domain=verse", "--temperature=0", "--max-tokens=3", "--show-experts")
    assert given.code == 0 and given.out.startswith("p")
    chat = call("chat", by_domain, "--domain=prose", "--max-tokens=3", stdin="pro\n/reset\npro\n")
    assert (chat.code, chat.err) == (0, "")


def test_generate_refuses_a_domain_that_would_do_nothing(call, run_folder: Path) -> None:
    code, _, err = call("generate", run_folder, "a", "--domain=verse")
    assert (code, err) == (2, "error: this model knows no domains: leave 'verse' out\n")


def test_evaluate_and_analyze_read_the_domains_of_the_text(call, by_domain: Path, text_file: Path) -> None:
    found = json.loads(call("evaluate", by_domain, "--json").out)
    record = read_run(by_domain)
    assert record.bits_per_byte == pytest.approx(found["bits_per_byte"], rel=1e-5) and len(record.samples) == 2
    code, _, err = call("evaluate", by_domain, f"--data.path={text_file}")
    assert code == 2 and "is of domain '', this model knows prose, verse: a domain is the first folder" in err
