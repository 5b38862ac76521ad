"""A calculator: arithmetic by a parser of its own, so that no expression can do more, or take long."""

from __future__ import annotations

import ast
import operator

MAX_CHARS = 200
MAX_DIGITS = 60
"""Of any number on the way."""

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses, such as "3 * (17 + 4)".
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        raise ValueError(f"an expression is a string of at most {MAX_CHARS} characters")
    try:
        tree = ast.parse(expression.replace("×", "*").replace("÷", "/").replace("^", "**").strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    value = _value(tree.body)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _operate(op, _value(left), _value(right))
    raise ValueError("only numbers, + - * / // % ** and parentheses can be computed")


def _operate(op: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(op, ast.Pow) and (abs(right) > 200 or abs(left) > 10**MAX_DIGITS):  # before it is tried
        raise ValueError("the power is too large")
    value = _OPERATORS[type(op)](left, right)
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    return _bounded(value)


def _bounded(value: int | float) -> int | float:
    if abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return value
