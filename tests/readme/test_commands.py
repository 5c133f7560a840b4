"""Every command that the README and the docs show is run, in order, in a fresh folder; every example too."""

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from moeforge.cli.main import main

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "make test": "it is what runs this test",
    "make demo": "test_make_demo below runs it, in make test-slow",
    "pip install .": "the environment that runs this has done it",
    "pip install 'moeforge[hf]'": "the environment that runs this has done it, or the page's Python is skipped",
    "pip install 'moeforge[serve]'": "the environment that runs this has done it",
}


def commands(page: str) -> list[str]:
    """The lines of all bash blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def run(command: str, folder: Path) -> str:
    """Output of one line. The program itself runs in this process: a new one would spend its time importing torch."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["moeforge", "serve"]:
        return start_and_stop([*words[1:], "--port", "0"], folder)
    if words[0] == "moeforge":
        with chdir(folder), StringIO() as out, redirect_stdout(out), redirect_stderr(out):
            code = main(words[1:])
            printed = out.getvalue()
    else:
        ended = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=1200)
        code, printed = ended.returncode, ended.stdout + ended.stderr
    assert code == 0, f"{command}\n{printed}"
    assert "Traceback" not in printed
    return printed


def start_and_stop(arguments: list[str], folder: Path) -> str:
    """What a server says until it listens; then it is told to end, and ends well."""
    command = [sys.executable, "-m", "moeforge", *arguments]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = ""
        while "listening at" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        server.terminate()
        assert server.wait(timeout=60) == 0
        return said


def run_python(path: Path, folder: Path) -> str:
    """Output of one script, run as ``python path`` would."""
    with chdir(folder), StringIO() as out, redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
        return out.getvalue()


@pytest.mark.parametrize(
    "page", ["README.md", "docs/tutorial.md", "docs/recipes.md", "docs/bridge.md", "docs/formats.md"]
)
def test_every_command_of_the_page_works(page, tmp_path):
    found = commands(page)
    assert found
    for command in found:
        if command not in ELSEWHERE:
            printed = run(command, tmp_path)
            assert printed.strip() or ">" in command, f"{command} printed nothing"


def test_the_readme_has_the_two_commands():
    assert {"make demo", "make test"} <= set(commands("README.md"))
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_python_of_the_readme_works(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")
    assert "torch.Size([4, 10, 32])" in run_python(tmp_path / "readme.py", tmp_path)


@pytest.mark.parametrize(
    ("page", "printed"), [("bridge", "model.layers.1.mlp 8 experts, 16 tensors"), ("transformers", "")]
)
def test_the_python_of_the_pages_on_transformers_works(page, printed, tmp_path):
    pytest.importorskip("transformers", reason="the page needs transformers: pip install 'moeforge[hf]'")
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / f"{page}.py").write_text("\n".join(code), encoding="utf-8")
    assert printed in run_python(tmp_path / f"{page}.py", tmp_path)


def test_the_python_of_the_families_works(tmp_path):
    pytest.importorskip("transformers", reason="the page compares with transformers: pip install 'moeforge[hf]'")
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "families.py").write_text(code, encoding="utf-8")
    assert "[10, 8]) router logits" in run_python(tmp_path / "families.py", tmp_path)


def test_the_table_that_the_families_show_is_the_one_that_is_used():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"``` { \.python \.table }\n(.*?)```", page, flags=re.DOTALL)
    source = ROOT / "src" / "moeforge" / "hub" / "families" / "mixtral.py"
    assert source.read_text(encoding="utf-8").endswith(f"\n\n{table}")


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(example, tmp_path):
    assert run_python(ROOT / "examples" / example, tmp_path).strip()


@pytest.mark.slow  # it evaluates both models on the whole held-out text
def test_make_demo(tmp_path):
    """The real target with fewer steps; ``tests/cli/test_demo.py`` runs the same on little text each time."""
    run(f"make -C {ROOT} demo DEMO='--steps=4 --out {tmp_path}/demo'", tmp_path)
    assert (tmp_path / "demo" / "summary.json").exists() and (tmp_path / "demo" / "report.html").exists()
