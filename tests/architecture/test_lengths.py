"""Short files, short functions, few positional parameters."""

import ast
from statistics import median

from tests.architecture.source import Function, functions, parse, place, python_files

OURS = ("src", "tests", "benchmarks", "examples")
MAX_FILE_LINES, MAX_MEDIAN_LINES = 400, 150
MAX_FUNCTION_LINES, MAX_POSITIONAL = 60, 7


def test_no_file_is_long() -> None:
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*OURS)}
    assert {where: lines for where, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_the_median_file_is_short() -> None:
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in python_files("src")]
    assert median(lengths) <= MAX_MEDIAN_LINES


def length(function: Function) -> int:
    """Lines from ``def`` to the end, docstring included, decorators not."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def positional(function: Function) -> int:
    """Parameters that a caller may give by position, less ``self``, ``cls`` and autograd's ``ctx``."""
    names = [parameter.arg for parameter in [*function.args.posonlyargs, *function.args.args]]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def is_program(function: Function) -> bool:
    """Whether Triton compiles it: such a function has no other data than pointers, sizes and strides, one by one."""
    return "triton.jit" in map(ast.unparse, function.decorator_list)


def test_no_function_is_long() -> None:
    long = [
        f"{place(path, function)} {function.name}: {length(function)} lines"
        for path in python_files(*OURS)
        for function in functions(parse(path))
        if length(function) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_function_takes_many_positional_parameters() -> None:
    many = [
        f"{place(path, function)} {function.name}: {positional(function)} positional parameters"
        for path in python_files(*OURS)
        for function in functions(parse(path))
        if positional(function) > MAX_POSITIONAL and not is_program(function)
    ]
    assert many == []


def test_the_measures_count_what_they_say() -> None:
    (function,) = functions(ast.parse("@wrap\ndef f(self, a, /, b, *rest, c, **more):\n    '''Doc.'''\n    return a\n"))
    assert (length(function), positional(function)) == (3, 2)
