"""Tools: what a policy calls is answered, whatever it wrote and whatever the tool does."""

import json
import re
import threading
import time

import pytest

from ftjax.rewards import sandbox
from ftjax.rollout import environments
from ftjax.rollout.calculator import calculator
from ftjax.rollout.environment import checked
from ftjax.rollout.python_tool import python
from ftjax.rollout.toolbox import HERMES_PROMPT, MAX_CALLS, MAX_CHARS, Call, Toolbox, described, hermes


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def later(word: str) -> str:
    """Says a word, after a while.

    Args:
        word: Any.
    """
    return f"{word}!"


def call(name, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def contents(reply) -> list[str]:
    assert not reply.done and reply.reward is None and {message["role"] for message in reply.observation} == {"tool"}
    return [message["content"] for message in reply.observation]


def test_calls_of_a_turn_are_answered_in_order_and_a_turn_without_one_ends_the_episode():
    box = Toolbox([add, later])
    assert contents(box.step(f"First {call('add', a=2, b=3)} then {call('later', word='hi')}\n{call('add', a=4)}")) == ["5", "hi!", "5"]
    assert box.step("The answer is 5.") == (None, None, True)


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        (call("ad", a=1), "error: there is no tool 'ad'; there are add, later"),
        (call("add", c=1), "error: TypeError: .*unexpected keyword argument 'c'"),
        (call("add", a="x"), "error: TypeError"),
        ("<tool_call>add(1, 2)</tool_call>", "error: the call is no JSON object with a name"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "error: the arguments of 'add' are no JSON object"),
        ('<tool_call>{"name": ["add"]}</tool_call>', "error: the call is no JSON object"),
        ('<tool_call>{"name": "add"}', "error: TypeError: .*missing 1 required positional argument"),
        ("<tool_call>" + "[" * 100_000, "error: the call is no JSON object"),
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}", "error: the call is no JSON object"),
    ],
)
def test_what_cannot_be_called_is_answered_by_what_is_wrong(turn, problem):
    (content,) = contents(Toolbox([add, later]).step(turn))
    assert re.match(problem, content)


@pytest.mark.parametrize("turn", ['"\\ud83d"', '"add", "arguments": {"\\ud83d": 1}', '"later", "arguments": {"word": "\\ud83d"}'])
def test_half_a_character_is_answered_by_what_any_tokenizer_and_file_takes(turn):
    box = Toolbox([add, later])
    (message,) = checked(box.step('<tool_call>{"name": ' + turn + "}</tool_call>"))[0]
    assert message["name"] in ("", *box.tools) and message["content"].encode("utf-8")


def test_arguments_may_be_json_in_a_string():
    assert hermes('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>') == [Call("add", {"a": 1})]
    assert hermes('<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>')[0].problem


def hostile(kind: str) -> str:
    """Does no good.

    Args:
        kind: What.
    """
    if kind == "hang":
        threading.Event().wait(30)
    if kind == "exit":
        raise SystemExit(0)
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "deep":
        return hostile("deep")
    return {"long": "x" * 10**6, "object": object(), "none": None}[kind]


def test_a_tool_that_hangs_or_leaves_or_returns_nonsense_is_answered_and_does_not_stop_the_others():
    kinds = ("hang", "exit", "interrupt", "deep", "long", "object", "none")
    began = time.monotonic()
    found = contents(Toolbox([hostile, add], seconds=1.0).step("".join(call("hostile", kind=kind) for kind in kinds) + call("add", a=1)))
    assert time.monotonic() - began < 10
    starts = ("TimeoutError: did not return within 1 s", "SystemExit: 0", "KeyboardInterrupt: ", "RecursionError: ")
    assert all(content.startswith(f"error: {start}") for content, start in zip(found, starts, strict=False))
    assert found[4] == "x" * MAX_CHARS + "… (cut at 2,000 characters)"
    assert found[5:] == ["error: the tool returned object, which is no JSON", "null", "2"]


def test_of_very_many_calls_the_first_few_are_answered():
    found = contents(Toolbox([add]).step(call("add", a=1) * 50))
    assert found == ["2"] * MAX_CALLS + [f"error: 50 calls, of which the first {MAX_CALLS} were answered"]


def test_another_parser_finds_calls_in_a_form_of_its_own():
    box = Toolbox([add], parser=lambda text: [Call("add", {"a": int(piece)}) for piece in text.split() if piece.isdigit()])
    assert contents(box.step("7 and 8")) == ["8", "9"] and box.step("none").done


def test_tools_are_described_by_their_docstrings_or_refused():
    (schema,) = Toolbox([add]).schemas
    assert schema["function"]["name"] == "add" and schema["function"]["parameters"]["required"] == ["a"]
    assert json.dumps(schema) in described([schema]) and "{tools}" in HERMES_PROMPT and "<tools>" in described([schema])
    with pytest.raises(ValueError, match="'<lambda>' cannot be described to a model"):
        Toolbox([lambda x: x])
    with pytest.raises(ValueError, match="a name of its own"):
        Toolbox([add, add])


def test_tools_that_remember_are_methods():
    class Counter:
        def __init__(self):
            self.count = 0

        def increase(self, by: int) -> int:
            """Counts.

            Args:
                by: How many.
            """
            self.count += by
            return self.count

    box = Toolbox([Counter().increase])
    assert [contents(box.step(call("increase", by=n)))[0] for n in (2, 3)] == ["2", "5"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("-(17 - 20) ** 2", "-9"),
        ("2^10", "1024"),
        ("7 // 2 + 7 % 4", "6"),
        ("1 / 3", "0.333333333333"),
        ("3 × 4", "12"),
    ],
)
def test_the_calculator_computes(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "10**60", "__import__('os')", "1 if 1 else 2", "'a' * 9", "True", "1/0", "(-8)**0.5", "1e999", "2 +", "(" * 150, "x"],
)
def test_the_calculator_refuses_the_rest_at_once(expression):
    began = time.monotonic()
    with pytest.raises((ValueError, ZeroDivisionError)):
        calculator(expression)
    assert time.monotonic() - began < 1


@pytest.mark.skipif(sandbox.isolation() is not None, reason=f"no isolation: {sandbox.isolation()}")
def test_programs_run_in_the_jail():
    assert python("print(6 * 7)") == "42\n"
    assert "error: " in python("1 / 0") and "ZeroDivisionError" in python("1 / 0")
    assert "printed too much" in python("while True: print('x' * 1000)")


def test_what_is_shipped_can_be_described():
    assert set(environments.CHECKS) <= set(environments.TOOLS)
    assert len(Toolbox(list(environments.TOOLS.values())).schemas) == len(environments.TOOLS)
