"""Every module says what it is, every public class and function what it does."""

import ast
from collections.abc import Iterator

from tests.architecture.source import Definition, parse, place, public, python_files


def undocumented(tree: ast.Module) -> Iterator[Definition]:
    """Public definitions without a docstring, less methods whose base class, in the same file, has the text."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    inherited: list[Definition] = []
    for derived in classes.values():
        bases = [classes[base.id] for base in derived.bases if isinstance(base, ast.Name) and base.id in classes]
        told = {method.name for base in bases for method in public(base) if ast.get_docstring(method)}
        inherited += [method for method in public(derived) if method.name in told]
    return (node for node in public(tree) if ast.get_docstring(node) is None and node not in inherited)


def test_every_module_has_a_docstring() -> None:
    files = python_files("src", "tests", "benchmarks", "examples")
    assert [place(path) for path in files if not ast.get_docstring(parse(path))] == []


def test_every_public_class_and_function_has_a_docstring() -> None:
    files = python_files("src")
    assert [f"{place(path, node)} {node.name}" for path in files for node in undocumented(parse(path))] == []


def test_a_missing_docstring_is_found() -> None:
    snippet = '''
def f(): ...
def _g(): ...
class A:
    """A."""
    def m(self): ...
    def n(self):
        """N."""
    def __len__(self): ...
class B(A):
    """B."""
    def m(self): ...
    def n(self): ...
'''
    assert [f"{node.name}:{node.lineno}" for node in undocumented(ast.parse(snippet))] == ["f:2", "m:6", "m:12"]
