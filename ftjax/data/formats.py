"""Rows of the formats that people have, as one canonical example: messages, or a text.

| format | columns |
|---|---|
| `messages` | `messages`: OpenAI's chat rows, with `weight` 0 or 1 on assistant messages, and `tools` |
| `sharegpt` | `conversations`: a list of `{"from", "value"}` |
| `prompt_completion` | `prompt`, `completion`: two strings or two lists of messages |
| `alpaca` | `instruction`, `input`, `output`; also Dolly's `instruction`, `context`, `response` |
| `self_instruct` | `instruction`, `instances`: a list of `{"input", "output"}`, each an example of its own |
| `question_answer` | `question`, `answer` (GSM8K, TriviaQA …) |
| `text` | `text` |

A prompt and its completion are a user and an assistant message; whether a chat template wraps them is the tokenising's choice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax import tree
from ftjax.data.rows import RowError, kind

Message = dict[str, Any]
"""`role` and `content` (a string), perhaps `weight`, and whatever else a template reads (`tool_calls`, `reasoning_content` …)."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "bot": "assistant"}
_SHAREGPT |= {"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to learn from: a conversation (`messages`) or a document (`text`)."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Any, ...] | None = None
    pieces: tuple[str, ...] = ()
    """Parts of the last answer, in order, where it is of consequence at which token each of them ends: the steps of a solution."""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The row as it was read: what a reward function may want to see, such as `answer`."""
    where: str = ""


def parse(
    row: Mapping[str, Any],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    end_marker: str = "",
    where: str = "",
) -> list[Example]:
    """Return the examples in a row: one, or as many as a `self_instruct` row has instances.

    Args:
      row: the columns by name.
      format: a name from `FORMATS`, or "auto" to tell it from the columns.
      columns: the format's column names -> the names that this data set uses: `{"prompt": "question", "completion": "answer"}`.
      end_marker: what this data set writes at the end of an answer, or of a text, to say that it ends (`<|endoftext|>`); taken off.
      where: the place to name in errors.

    Raises:
      RowError: a column is missing or of the wrong type.
    """
    columns = dict(columns or {})
    renamed = {**row, **{name: row[theirs] for name, theirs in columns.items() if theirs in row}}
    try:
        for theirs in columns.values():
            if theirs not in row:
                raise RowError(f"is missing; the row has {column_names(row)}; nearest: {tree.nearest(theirs, row)}", column=theirs)
        chosen = detect(renamed) if format == "auto" else format
        if chosen not in FORMATS:
            raise ValueError(f"data: there is no format {chosen!r}; nearest: {tree.nearest(chosen, [*FORMATS, 'auto'])}")
        examples = FORMATS[chosen](renamed)
    except RowError as error:
        raise error.at(where) from None
    return [dataclasses.replace(_without(end_marker, example), columns=dict(row), where=where) for example in examples]


def _without(end_marker: str, example: Example) -> Example:
    if not end_marker:
        return example
    messages = tuple(
        {**message, "content": message["content"].removesuffix(end_marker)} if message["role"] == "assistant" else message
        for message in example.messages
    )
    return dataclasses.replace(example, messages=messages, text=example.text and example.text.removesuffix(end_marker))


def detect(row: Mapping[str, Any]) -> str:
    """Return the name of the format that has these columns."""
    for name, needed in _NEEDS.items():
        if any(all(column in row for column in choice) for choice in needed):
            return name
    raise RowError(
        f"no known format has the columns {column_names(row)}; name the columns (columns={{'prompt': …, 'completion': …}}) or write one "
        "of: " + "; ".join(f"{name} ({' or '.join('+'.join(choice) for choice in needed)})" for name, needed in _NEEDS.items())
    )


def messages_row(row: Mapping[str, Any]) -> list[Example]:
    """Read OpenAI's chat rows."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"must be a list, got {kind(tools)}", column="tools")
    return [Example(messages_in(row, "messages"), tools=tuple(tools) if tools else None)]


def sharegpt_row(row: Mapping[str, Any]) -> list[Example]:
    """Read ShareGPT's `conversations` of `{"from", "value"}`."""
    turns = []
    for at, turn in enumerate(_list(row, "conversations")):
        column = f"conversations[{at}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"must be an object, got {kind(turn)}", column=column)
        if "from" not in turn and "role" in turn:
            turns.append(dict(turn))
            continue
        speaker = string_in(turn, "from", prefix=f"{column}.")
        if speaker not in _SHAREGPT:
            raise RowError(f"unknown speaker {speaker!r}; nearest: {tree.nearest(speaker, _SHAREGPT)}", column=f"{column}.from")
        message = {"role": _SHAREGPT[speaker], "content": string_in(turn, "value", prefix=f"{column}.")}
        turns.append(message | ({"weight": turn["weight"]} if "weight" in turn else {}))
    if isinstance(row.get("system"), str) and row["system"] and (not turns or turns[0].get("role") != "system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return [Example(messages_in({"conversations": turns}, "conversations"))]


def prompt_completion_row(row: Mapping[str, Any]) -> list[Example]:
    """Read a prompt and its completion; of two lists of messages only the completion's are trained."""
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        completion = row["completion"]
        if isinstance(completion, str):
            row = {**row, "completion": [{"role": "assistant", "content": completion}]}
        if isinstance(row["prompt"], str):
            row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        context = tuple({**message, "weight": 0} if message["role"] == "assistant" else message for message in messages_in(row, "prompt"))
        return [Example(context + messages_in(row, "completion"))]
    return [_pair(string_in(row, "prompt"), string_in(row, "completion"))]


def alpaca_row(row: Mapping[str, Any]) -> list[Example]:
    """Read Alpaca's rows (`input`, `output`) and Dolly's (`context`, `response`)."""
    context, answer = ("context", "response") if "response" in row else ("input", "output")
    return [_pair(_instruction(row, row, context), string_in(row, answer), system=row.get("system"))]


def self_instruct_row(row: Mapping[str, Any]) -> list[Example]:
    """Read Self-Instruct's rows: one instruction with several instances."""
    examples = []
    for at, instance in enumerate(_list(row, "instances")):
        if not isinstance(instance, Mapping):
            raise RowError(f"must be an object, got {kind(instance)}", column=f"instances[{at}]")
        examples.append(_pair(_instruction(row, instance, "input"), string_in(instance, "output", prefix=f"instances[{at}].")))
    return examples


def question_answer_row(row: Mapping[str, Any]) -> list[Example]:
    """Read a question and its answer."""
    return [_pair(string_in(row, "question"), string_in(row, "answer"))]


def text_row(row: Mapping[str, Any]) -> list[Example]:
    """Read a document."""
    return [Example(text=string_in(row, "text"))]


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Example]]] = {
    "messages": messages_row,
    "sharegpt": sharegpt_row,
    "prompt_completion": prompt_completion_row,
    "alpaca": alpaca_row,
    "self_instruct": self_instruct_row,
    "question_answer": question_answer_row,
    "text": text_row,
}
# The columns that tell a format, the most specific first.
_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt", "completion"),),
    "self_instruct": (("instruction", "instances"),),
    "alpaca": (("instruction", "output"), ("instruction", "response")),
    "question_answer": (("question", "answer"),),
    "text": (("text",),),
}


def column_names(row: Mapping[str, Any]) -> str:
    """Return the columns of a row, for messages."""
    return ", ".join(map(repr, list(row)[:20])) or "no columns"


def string_in(row: Mapping[str, Any], column: str, *, prefix: str = "", default: str | None = None) -> str:
    """Return the text in a column; `prefix` is of the place that an error names."""
    value = row.get(column, default)
    if not isinstance(value, str):
        reason = f"must be a string, got {kind(value)}" if column in row else f"is missing; the row has {column_names(row)}"
        raise RowError(reason, column=prefix + column)
    return value


def _list(row: Mapping[str, Any], column: str) -> Sequence[Any]:
    value = row.get(column)
    if not isinstance(value, (list, tuple)):
        raise RowError(
            f"must be a list, got {kind(value)}" if column in row else f"is missing; the row has {column_names(row)}", column=column
        )
    if not value:
        raise RowError("is an empty list", column=column)
    return value


def _pair(prompt: str, completion: str, *, system: Any = None) -> Example:
    head = ({"role": "system", "content": system},) if isinstance(system, str) and system else ()
    return Example((*head, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}))


def _instruction(row: Mapping[str, Any], instance: Mapping[str, Any], column: str) -> str:
    context = instance.get(column) or ""
    if not isinstance(context, str):
        raise RowError(f"must be a string, got {kind(context)}", column=column)
    instruction = string_in(row, "instruction")
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def messages_in(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """Return the messages in a column, checked."""
    return tuple(_message(message, f"{column}[{at}]") for at, message in enumerate(_list(row, column)))


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"must be an object with role and content, got {kind(message)}", column=column)
    role = string_in(message, "role", prefix=f"{column}.")
    if role not in ROLES:
        raise RowError(f"unknown role {role!r}; nearest: {tree.nearest(role, ROLES)}", column=f"{column}.role")
    weight = message.get("weight", 1)
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"must be 0 or 1, got {weight!r}", column=f"{column}.weight")
    # Parquet and `datasets` fill keys that other rows have with null: an absent key and a null one are the same.
    clean = {key: value for key, value in message.items() if value is not None}
    clean["content"] = _content(message.get("content"), f"{column}.content", optional=bool(message.get("tool_calls")))
    if clean.get("tool_calls"):
        clean["tool_calls"] = [_tool_call(call, f"{column}.tool_calls[{at}]") for at, call in enumerate(_list(message, "tool_calls"))]
    return clean


def _content(content: Any, column: str, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        raise RowError(f"must be a string, got {kind(content)}", column=column)
    for at, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            got = part.get("type", "no type") if isinstance(part, Mapping) else kind(part)
            raise RowError(f"only parts of type 'text' can be read, got {got!r}", column=f"{column}[{at}]")
    return "".join(part["text"] for part in content)


def _tool_call(call: Any, column: str) -> dict[str, Any]:
    """OpenAI writes a call's arguments as a JSON string; chat templates expect the object."""
    if not isinstance(call, Mapping):
        raise RowError(f"must be an object, got {kind(call)}", column=column)
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            function = {**function, "arguments": json.loads(function["arguments"])}
        except ValueError:
            raise RowError("is not JSON", column=f"{column}.function.arguments") from None
        return {**call, "function": function}
    return dict(call)
