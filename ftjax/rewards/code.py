"""Code: the share of tests that the program in a completion passes, run in a jail that knows no answers."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from ftjax.rewards import sandbox
from ftjax.rewards.beside import beside
from ftjax.rewards.completion import Completion, text

_FORMS = "{input, output}, {call, arguments, returns}, {expression, returns}, or 'assert f(1) == 2'"
_COLLECTIONS = {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "sorted": sorted}


class Trial(NamedTuple):
    """What one run is given and what must come of it: an output, or an expression's value."""

    stdin: str
    expression: str | None
    expected: Any


def code(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    tests: Sequence[Any],
    seconds: float = 5.0,
    memory_bytes: int = 256 << 20,
    parallel: int = 0,
    **columns: Any,
) -> list[float | None]:
    """Return the share of its tests that each completion's program passes: its last fenced block, Python, standard library only.

    Each test is a run of its own in a `sandbox`. The program gets the input, or the expression to evaluate; what must come out stays in
    this process, which compares. Outputs are equal when their lines are, white space at the ends aside, and the program ends with 0;
    values when Python says so, lists and tuples alike, floats within one part in a million.

    Args:
      prompts: not looked at.
      completions: what the model wrote; without a fenced block it scores 0.
      tests: of each row a list, or its JSON, of {input, output}, {call, arguments, returns}, {expression, returns}, or asserts of
        equality with a literal as MBPP has them. None or none: the row scores None.
      seconds: of each run.
      memory_bytes: of each process.
      parallel: runs at a time, of this process; 0: one a CPU.
      **columns: not looked at.

    Raises:
      sandbox.NoIsolation: the kernel does not isolate processes.
      ValueError: a test is in none of the forms.
    """
    sandbox.check()
    limits = sandbox.Limits(seconds=seconds, memory_bytes=memory_bytes)
    rows = [read_tests(row) for row in tests]
    programs = [program(text(completion)) for completion in completions]
    runs = [partial(passes, code, test, limits) for code, row in zip(programs, rows, strict=True) for test in row if code]
    passed = iter(beside(runs, at_once=parallel or os.cpu_count() or 1, whose="code"))
    counts = [sum(next(passed) for _ in row) if code else 0 for code, row in zip(programs, rows, strict=True)]
    return [count / len(row) if row else None for count, row in zip(counts, rows, strict=True)]


def program(text: str) -> str:
    """Return the last closed fenced block that is marked as Python or not at all; "" where there is none."""
    for block in reversed(text.split("```")[1:-1:2]):
        language, newline, body = block.partition("\n")
        if newline and language.strip().lower() in ("", "python", "python3", "py"):
            return body
    return ""


def read_tests(row: Any) -> list[Trial]:
    """Return the tests of a row, in any of their forms."""
    if isinstance(row, str):
        row = json.loads(row)
    return [_read_test(test) for test in row or ()]


def passes(program: str, test: Trial, limits: sandbox.Limits) -> bool:
    """Run a program on one test."""
    if test.expression is None:
        ran = sandbox.run(program, stdin=test.stdin, limits=limits)
        return ran.exit_code == 0 and _lines(ran.stdout) == _lines(test.expected)
    ran = sandbox.run(_HARNESS, stdin=json.dumps([program, test.expression]), limits=limits)
    try:
        return same(json.loads(ran.stdout), plain(test.expected))
    except (ValueError, RecursionError):  # it has printed no value, or none that an answer could be
        return False


def plain(value: Any) -> Any:
    """Return a value as JSON can say it and `same` compares it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((plain(part) for part in value), key=json.dumps)}
    if isinstance(value, dict):
        return {"dict": sorted(([plain(key), plain(part)] for key, part in value.items()), key=json.dumps)}
    return {"other": repr(value)}


def same(value: Any, expected: Any) -> bool:
    """Return whether two `plain` values are equal, floats nearly."""
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict):
        return isinstance(value, dict) and value.keys() == expected.keys() and all(same(value[key], expected[key]) for key in expected)
    if isinstance(expected, float) or isinstance(value, float):
        numbers = isinstance(value, (int, float)) and isinstance(expected, (int, float))
        return numbers and (value == expected or math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9))
    return type(value) in (type(expected), bool, int) and value == expected


# What evaluates an expression: the value goes to the standard output, whatever the program prints elsewhere.
_HARNESS = f"""
import json, os, sys
{inspect.getsource(plain).replace(": Any", "").replace(" -> Any", "")}
program, expression = json.load(sys.stdin)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {{"__name__": "solution"}}
exec(compile(program, "solution.py", "exec"), names)
answers.write(json.dumps(plain(eval(expression, names))))
answers.flush()
os._exit(0)
"""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _read_test(test: Any) -> Trial:
    match test:
        case str():
            return _read_assert(test)
        case {"input": str(given), "output": str(output)}:
            return Trial(given, None, output)
        case {"call": str(name), "arguments": [*arguments], "returns": value} if all(part.isidentifier() for part in name.split(".")):
            return Trial("", f"{name}(*{arguments!r})", value)
        case {"expression": str(expression), "returns": value}:
            return Trial("", expression, value)
    raise ValueError(f"code: a test is {_FORMS}; this is none: {test!r}.")


def _read_assert(source: str) -> Trial:
    """Split an assert into what the program evaluates and what must come of it, so that the program never sees the latter."""
    try:
        match ast.parse(source.strip()).body:
            case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]:
                return Trial("", ast.unparse(left), _literal(right))
            case [ast.Assert(test=ast.Call() as call)]:
                return Trial("", f"bool({ast.unparse(call)})", True)
            case [ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call))]:
                return Trial("", f"bool({ast.unparse(call)})", False)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"code: a test is {_FORMS}; this is none: {source!r} ({error}).") from None
    raise ValueError(f"code: an assert compares a call by == with a literal, or is a call; this one is not: {source!r}.")


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[part], keywords=[]) if name in _COLLECTIONS:
            return _COLLECTIONS[name](ast.literal_eval(part))
    return ast.literal_eval(node)
