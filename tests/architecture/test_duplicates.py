"""No two functions do the same: equal bodies under other names are found by comparing syntax trees."""

import ast
from collections import defaultdict

from tests.architecture.source import Function, functions, parse, place, python_files, without_docstring

MIN_STATEMENTS = 3
IGNORED_FIELDS = {"annotation", "returns", "ctx", "type_comment", "simple", "kind"}

Shape = tuple[object, ...]


class _Shape:
    """Turns syntax into nested tuples, with a function's own names numbered by first use."""

    def __init__(self, function: Function) -> None:
        nodes = list(ast.walk(function))
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.local = stored | {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.numbers: dict[str, int] = {}

    def __call__(self, node: object) -> object:
        match node:
            case ast.Name(id=name) | ast.arg(arg=name):
                return self.numbers.setdefault(name, len(self.numbers)) if name in self.local else name
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                return ("Assign", (self(target),), self(value))
            case ast.AST():
                fields = [name for name in node._fields if name not in IGNORED_FIELDS]
                return (type(node).__name__, *(self(getattr(node, name)) for name in fields))
            case list():
                return tuple(self(child) for child in node)
        return repr(node)


def fingerprint(function: Function) -> Shape | None:
    """The body with its own names numbered, or None when it's too small to count as a copy."""
    body = without_docstring(function.body)
    if sum(isinstance(node, ast.stmt) for statement in body for node in ast.walk(statement)) < MIN_STATEMENTS:
        return None
    shape = _Shape(function)
    return tuple(shape(statement) for statement in body)


def duplicates(trees: dict[str, ast.AST]) -> list[list[str]]:
    """Groups of ``file name`` of functions with equal bodies; the trees are keyed by file."""
    groups: dict[Shape, list[str]] = defaultdict(list)
    for file, tree in trees.items():
        for function in functions(tree):
            mark = fingerprint(function)
            if mark is not None:
                groups[mark].append(f"{file}:{function.lineno} {function.name}")
    return [group for group in groups.values() if len(group) > 1]


def test_no_two_functions_have_equal_bodies() -> None:
    assert duplicates({place(path): parse(path) for path in python_files("src", "benchmarks", "examples")}) == []


FIRST = '''
def total(rows, scale: float = 1.0):
    """Sum."""
    out: float = 0.0
    for row in rows:
        out += row * scale
    return out
'''
RENAMED = """
class Counter:
    def add(values, by):
        result = 0.0
        for value in values:
            result += value * by
        return result
"""


def test_a_renamed_copy_is_found() -> None:
    found = duplicates({"a": ast.parse(FIRST), "b": ast.parse(RENAMED)})
    assert found == [["a:2 total", "b:3 add"]]


def test_another_constant_call_or_order_is_no_copy() -> None:
    others = [
        RENAMED.replace("0.0", "1.0"),
        RENAMED.replace("* by", "+ by"),
        RENAMED.replace("value * by", "by * value"),
    ]
    assert all(duplicates({"a": ast.parse(FIRST), "b": ast.parse(other)}) == [] for other in others)


def test_one_line_forwards_are_no_copies() -> None:
    forward = "def f(x):\n    return g(x)\n"
    assert duplicates({"a": ast.parse(forward), "b": ast.parse(forward)}) == []
