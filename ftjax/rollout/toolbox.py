"""Tools: plain functions that a policy may call, as an environment whose answers are what they return."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ftjax.rollout.deadline import within
from ftjax.rollout.environment import Reply

Tool = Callable[..., Any]
"""A function with type hints and a docstring that describes it and, under `Args:`, each of its arguments. It may be a coroutine."""

MAX_CALLS = 8
"""Calls of one turn that are answered."""
MAX_CHARS = 2000
"""Of what a call returns, that the policy reads."""


class Call(NamedTuple):
    """What a policy asks for."""

    name: str
    arguments: Mapping[str, Any]
    problem: str = ""
    """Why it cannot be read, if it cannot; then there is neither name nor arguments."""


Parser = Callable[[str], Sequence[Call]]
"""Finds the calls in a turn of the policy."""

HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)

HERMES_PROMPT = """You may call functions. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
For each call write a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call>"""
"""What a system message says of tools where a chat template does not show them itself; `{tools}` stands for their schemas."""


def hermes(completion: str) -> list[Call]:
    """Return the calls written as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: the form of Hermes and of Qwen's templates.

    >>> hermes('Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>{"name"</tool_call>')
    [Call(name='add', arguments={'a': 1}, problem=''), Call(name='', arguments={}, problem='the call is no JSON object with a name')]
    """
    return [_read(piece) for piece in HERMES.findall(completion)]


def _read(piece: str) -> Call:
    try:
        match json.loads(piece):
            case {"name": str(name), "arguments": str(arguments)}:
                return _read(json.dumps({"name": name, "arguments": dict(json.loads(arguments))}))
            case {"name": str(name), "arguments": dict(arguments)}:
                return Call(name, arguments)
            case {"name": str(name)} as found if "arguments" not in found:
                return Call(name, {})
            case {"name": str(name)}:
                return Call("", {}, f"the arguments of {name[:80]!r} are no JSON object")
    except (ValueError, TypeError, RecursionError):
        pass
    return Call("", {}, "the call is no JSON object with a name")


class Toolbox:
    """The environment of some tools: a turn that calls none ends the episode, and others are answered by messages of the role `tool`.

    A call that cannot be read, of an unknown tool, with wrong arguments, that raises, hangs or returns what cannot be written down is
    answered by what went wrong: the policy may learn from it, and the run goes on. Calls of a turn run side by side. For tools that
    remember, write an environment that makes a toolbox of its methods in `reset`, and has it `step`.

    Args:
      tools: by the names of the functions.
      parser: how calls are found.
      seconds: that a call may take.

    Example:
      >>> from ftjax.rollout.calculator import calculator
      >>> turn = '<tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>'
      >>> Toolbox([calculator]).step(turn).observation
      [{'role': 'tool', 'name': 'calculator', 'content': '42'}]

    Raises:
      ValueError: two tools have one name, or one has no docstring or an argument without a type hint or a description.
    """

    def __init__(self, tools: Sequence[Tool], *, parser: Parser = hermes, seconds: float = 10.0):
        self.tools = {tool.__name__: tool for tool in tools}
        if len(self.tools) != len(tools):
            raise ValueError(f"tools: each needs a name of its own, not {[tool.__name__ for tool in tools]}.")
        self.schemas = tuple(map(_schema, tools))
        """JSON schemas, as chat templates read them."""
        self.parser, self.seconds = parser, seconds

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin: there is nothing to remember."""

    def step(self, completion: str) -> Reply:
        """Answer the calls of a turn."""
        calls = list(self.parser(completion))
        if not calls:
            return Reply(done=True)
        results = within(self.seconds, [partial(self._call, call) for call in calls[:MAX_CALLS]])
        names = [call.name if call.name in self.tools else "" for call in calls]  # a name of the policy's own may be anything
        said = [{"role": "tool", "name": name, "content": _told(result)} for name, result in zip(names, results, strict=False)]
        if len(calls) > MAX_CALLS:
            said.append({"role": "tool", "name": "", "content": f"error: {len(calls)} calls, of which the first {MAX_CALLS} were answered"})
        return Reply(said)

    def _call(self, call: Call) -> str:
        """Return what the policy is told of a call, or raise whatever the tool does."""
        if call.problem:
            return f"error: {call.problem}"
        if call.name not in self.tools:
            return f"error: there is no tool {call.name[:80]!r}; there are {', '.join(self.tools)}"
        return self.tools[call.name](**call.arguments)


def _told(result: Any) -> str:
    if isinstance(result, BaseException):
        result = f"error: {type(result).__name__}: {result}"
    if not isinstance(result, str):
        try:
            result = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            result = f"error: the tool returned {type(result).__name__}, which is no JSON"
    return result if len(result) <= MAX_CHARS else f"{result[:MAX_CHARS]}… (cut at {MAX_CHARS:,} characters)"


def _schema(tool: Tool) -> dict[str, Any]:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise everybody to install PyTorch
    from transformers.utils import get_json_schema  # slow to import

    try:
        return get_json_schema(tool)
    except Exception as error:  # of several classes of transformers
        raise ValueError(f"tools: {tool.__name__!r} cannot be described to a model: {error}") from error


def described(schemas: Sequence[Mapping[str, Any]], prompt: str = HERMES_PROMPT) -> str:
    """Return what a system message says of tools."""
    return prompt.replace("{tools}", "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas))
