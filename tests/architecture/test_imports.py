"""Who imports what, beyond the layers that import-linter holds: optional packages have one owner each."""

import ast
import tomllib
from collections.abc import Iterator

import pytest

from tests.architecture.source import ROOT, SRC, parse, place, python_files

# The packages of the optional extras; what needs one says so when it's missing, so there's one place to say it.
OPTIONAL = (
    *("transformers", "gguf", "datasets", "pyarrow", "matplotlib", "jinja2", "tensorboard", "lm_eval", "triton"),
    *("fastapi", "uvicorn", "prometheus_client", "llguidance", "scipy", "compressed_tensors"),
)
BORROWS = {
    "transformers": "src/moeforge/models/rope.py",
    "jinja2": "src/moeforge/serve/template.py",
    "scipy": "src/moeforge/compress/merge.py",
}
"""A file besides the owner that calls single functions of the package."""
ENTRY = {"tensorboard": "torch.utils.tensorboard"}

MADE_OF = (SRC / "hub", SRC / "serve")

ROOMS = {"kernels", "moe", "models", "hub", "data", "parallel", "recipes", "cli"}
VERBS = {"train", "upcycle", "compress", "generate", "serve", "evaluate", "analyze"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules that a file imports, at the top or inside a function."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def imports(tree: ast.AST, package: str) -> bool:
    """Whether the file imports the package or a part of it."""
    roots = {package, ENTRY.get(package, package)}
    return any(name == root or name.startswith(f"{root}.") for name in imported(tree) for root in roots)


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_has_one_owner(package: str) -> None:
    users = [
        path for path in python_files("src") if imports(parse(path), package) and place(path) != BORROWS.get(package)
    ]
    # What stands in these rooms may be made of a package's own classes; its modules for that import it at the top.
    owners = {next((room for room in MADE_OF if path.is_relative_to(room)), path) for path in users}
    assert len(owners) <= 1, f"{package} is imported in {owners}: let one of them own it"


def test_imports_are_found_wherever_they_stand() -> None:
    snippet = "def f():\n    from torch.utils.tensorboard import SummaryWriter\n    import matplotlib.pyplot as plt\n"
    assert [package for package in OPTIONAL if imports(ast.parse(snippet), package)] == ["matplotlib", "tensorboard"]
    assert not imports(ast.parse("import datasets_of_mine"), "datasets")


def test_every_room_of_the_house_is_in_the_plan() -> None:
    folders = {path.name for path in SRC.iterdir() if (path / "__init__.py").exists()}
    assert folders - ROOMS - VERBS == set(), "one folder per verb, named as the verb; anything else has a room already"


def test_a_verbs_folder_has_its_command() -> None:
    verbs = {path.name for path in SRC.iterdir() if (path / "__init__.py").exists()} & VERBS
    assert sorted(verb for verb in verbs if not (SRC / "cli" / f"{verb}.py").exists()) == []


def test_no_extra_is_forgotten() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    users = {name for name in extras if name not in ("dev", "docs", "all")}
    assert extras["all"] == [f"moeforge[{','.join(name for name in extras if name in users - {'triton'})}]"]
    listed = {requirement.split(">")[0].replace("-", "_") for name in users for requirement in extras[name]}
    assert listed == set(OPTIONAL)
