r"""Rows of judged responses: pairs of which one was preferred, single ones that are good or bad, and solutions judged step by step.

| format | columns |
|---|---|
| `preference` | `prompt`, `chosen`, `rejected`, each a string or messages, perhaps `margin`; without `prompt`: two conversations |
| `dialogue` | `chosen`, `rejected`: texts of turns that begin with "\n\nHuman: " and "\n\nAssistant: " (HH-RLHF) |
| `openai_preference` | `input.messages`, `preferred_output`, `non_preferred_output` |
| `triple` | those of `preference`, and `reference`: a third response, the best known one |
| `labelled` | `prompt`, `completion`, `label`: true or false, perhaps `density_ratio`: above 0 |
| `stepwise` | `prompt`, `completions`: the steps of a solution, and `labels`: whether each is right, true or false or a share in [0, 1] |

Two conversations part at the first *message* that differs, so no token is ever cut in two; what they share is the prompt. Steps are joined
by `STEP_END`, a line break, and each is judged at the token that this ends with, the last at the token that ends the answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax import tree
from ftjax.data.formats import Example, Message, column_names, messages_in, string_in
from ftjax.data.rows import RowError, kind

PAIRS, TRIPLES, LABELLED, STEPS = "pairs", "triples", "labelled", "steps"
KINDS = {PAIRS: 2, TRIPLES: 3, LABELLED: 1, STEPS: 1}
"""What a loss learns from, and how many responses an item of it has: chosen and rejected, a best known one too, single ones with a label,
and those whose steps have labels."""
STEP_END = "\n"
ANSWERS = ("chosen", "rejected", "reference", "completion", "completions", "preferred_output", "non_preferred_output")
"""The columns that hold responses, which a data set may end with a mark of its own."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A prompt with what was answered to it."""

    responses: tuple[Example, ...]
    """Conversations that begin with the same prompt, of which nothing is trained: the chosen one first, or a single one."""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What is known of them, by the name that `Batch` has for it: `margins`, `desirable`, `density_ratios`."""
    labels: tuple[float, ...] = ()
    """Of the steps of a single response, which are its `pieces`."""


def parse(
    row: Mapping[str, Any],
    wanted: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    end_marker: str = "",
    where: str = "",
) -> list[Judged]:
    """Return the judged responses in a row: a pair is one item of pairs, or two labelled ones.

    Args:
      row: the columns by name.
      wanted: of `KINDS`.
      format: a name from `FORMATS`, or "auto" to tell it from the columns.
      columns: the format's column names -> the names that this data set uses.
      end_marker: what this data set writes at the end of a response to say that it ends; taken off.
      where: the place to name in errors.

    Raises:
      RowError: a column is missing or of the wrong type, both responses are equal, one is empty, or other responses stand there than are
        wanted.
    """
    renamed = {**row, **{name: row[theirs] for name, theirs in (columns or {}).items() if theirs in row}}
    if end_marker:
        renamed |= {name: _without(end_marker, renamed[name]) for name in ANSWERS if name in renamed}
    try:
        chosen = detect(renamed, wanted) if format == "auto" else format
        if chosen not in FORMATS:
            raise ValueError(
                f"data: there is no format {chosen!r} of judged responses; nearest: {tree.nearest(chosen, [*FORMATS, 'auto'])}"
            )
        found = FORMATS[chosen](renamed)
        if wanted == PAIRS and len(found.responses) < 2:
            raise RowError("holds a single response, and pairs are wanted: use an algorithm of single responses, such as kto")
        if bool(found.labels) != (wanted == STEPS) or (wanted == TRIPLES and len(found.responses) < 3):
            raise RowError(f"is a row of the format {chosen!r}, and {wanted} are wanted: use another algorithm, or name another format")
    except RowError as error:
        raise error.at(where) from None
    count = 2 if wanted == LABELLED else KINDS[wanted]
    placed = tuple(dataclasses.replace(one, columns=dict(row), where=where) for one in found.responses[:count])
    if wanted != LABELLED or len(placed) == 1:
        return [Judged(placed, found.numbers, found.labels)]
    return [Judged((one,), {"desirable": float(at == 0)}) for at, one in enumerate(placed)]


def detect(row: Mapping[str, Any], wanted: str = PAIRS) -> str:
    """Return the name of the format that has these columns; a row may hold what is `wanted` beside other things."""
    if wanted == TRIPLES and {"chosen", "rejected", "reference"} <= row.keys():
        return "triple"
    if wanted == STEPS and {"prompt", "completions", "labels"} <= row.keys():
        return "stepwise"
    if "preferred_output" in row and "non_preferred_output" in row:
        return "openai_preference"
    if "chosen" in row and "rejected" in row:
        bare = "prompt" not in row and isinstance(row["chosen"], str)
        return "dialogue" if bare else "preference"
    if "prompt" in row and "completion" in row and "label" in row:
        return "labelled"
    raise RowError(
        f"no format of judged responses has the columns {column_names(row)}; name the columns (columns={{'chosen': …, 'rejected': …}}) or "
        "write prompt, chosen and rejected (and reference), or prompt, completion and label, or prompt, completions and labels"
    )


def preference_row(row: Mapping[str, Any]) -> Judged:
    """Read a prompt, its chosen and its rejected response; without a prompt, two conversations."""
    if row.get("prompt") is None:
        pair = _parted(messages_in(row, "chosen"), messages_in(row, "rejected"))
    else:
        prompt = _turns(row, "prompt", "user")
        pair = _joined(prompt, _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant"))
    margin = _number(row, "margin")
    return Judged(pair) if margin is None else Judged(pair, {"margins": margin})


def triple_row(row: Mapping[str, Any]) -> Judged:
    """Read a pair with a third response to the same prompt."""
    pair = preference_row(row)
    if row.get("prompt") is None:
        prompt = _shared(messages_in(row, "chosen"), messages_in(row, "rejected"))
        third = messages_in(row, "reference")
        if third[: len(prompt)] != prompt or len(third) == len(prompt):
            raise RowError("does not begin with the messages that chosen and rejected share", column="reference")
        third = third[len(prompt) :]
    else:
        prompt, third = _turns(row, "prompt", "user"), _turns(row, "reference", "assistant")
    return Judged((*pair.responses, Example(_silent(prompt) + _said(third, "reference"))), pair.numbers)


def dialogue_row(row: Mapping[str, Any]) -> Judged:
    """Read two texts of turns."""
    return Judged(_parted(_dialogue(row, "chosen"), _dialogue(row, "rejected")))


def openai_preference_row(row: Mapping[str, Any]) -> Judged:
    """Read OpenAI's rows for preference fine-tuning."""
    asked = row.get("input")
    if not isinstance(asked, Mapping):
        raise RowError(f"must be an object with messages, got {kind(asked)}", column="input")
    outputs = (messages_in(row, name) for name in ("preferred_output", "non_preferred_output"))
    pair = _joined(messages_in(asked, "messages"), *outputs)
    tools = asked.get("tools")
    return Judged(tuple(dataclasses.replace(one, tools=tuple(tools) if tools else None) for one in pair))


def labelled_row(row: Mapping[str, Any]) -> Judged:
    """Read a prompt, a response and whether it is good; perhaps p(desirable | prompt) / p(undesirable | prompt) too, as BCO weighs by."""
    label = row.get("label")
    if not isinstance(label, bool):
        raise RowError(f"must be true or false, got {kind(label)}", column="label")
    messages = _silent(_turns(row, "prompt", "user")) + _said(_turns(row, "completion", "assistant"), "completion")
    ratio = _number(row, "density_ratio")
    if ratio is not None and ratio <= 0:
        raise RowError(f"must be above 0; it is {ratio:g}", column="density_ratio")
    return Judged((Example(messages),), {"desirable": float(label)} | ({} if ratio is None else {"density_ratios": ratio}))


def stepwise_row(row: Mapping[str, Any]) -> Judged:
    """Read a prompt and the steps of a solution, each with a label (TRL's stepwise supervision)."""
    steps, labels = ((list(value) if isinstance(value := row.get(name), (list, tuple)) else None) for name in ("completions", "labels"))
    for name, value in (("completions", steps), ("labels", labels)):
        if not value:
            raise RowError("is an empty list" if value == [] else f"must be a list, got {kind(row.get(name))}", column=name)
    if len(steps) != len(labels):
        raise RowError(f"has {len(labels)} labels for {len(steps)} steps", column="labels")
    for at, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str) or not step.strip():
            reason = "is an empty step" if isinstance(step, str) else f"must be a string, got {kind(step)}"
            raise RowError(reason, column=f"completions[{at}]")
        if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
            got = kind(label) if not isinstance(label, (int, float)) else label
            raise RowError(f"must be true, false or a share in [0, 1], got {got}", column=f"labels[{at}]")
    pieces = tuple(step.strip() for step in steps)
    answer = {"role": "assistant", "content": STEP_END.join(pieces)}
    return Judged((Example((*_silent(_turns(row, "prompt", "user")), answer), pieces=pieces),), labels=tuple(map(float, labels)))


FORMATS: dict[str, Callable[[Mapping[str, Any]], Judged]] = {
    "preference": preference_row,
    "dialogue": dialogue_row,
    "openai_preference": openai_preference_row,
    "triple": triple_row,
    "labelled": labelled_row,
    "stepwise": stepwise_row,
}


def _without(end_marker: str, value: Any) -> Any:
    """Return a response, its messages or its steps without the mark at the end of each."""
    if isinstance(value, (list, tuple)):
        return [_without(end_marker, one) for one in value]
    if isinstance(value, Mapping) and value.get("role") == "assistant":
        return {**value, "content": _without(end_marker, value.get("content"))}
    return value.removesuffix(end_marker) if isinstance(value, str) else value


def _number(row: Mapping[str, Any], column: str) -> float | None:
    """Return a finite number, or None where there is nothing."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"must be a number, got {kind(value)}", column=column)
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"must be finite, got {number}", column=column)
    return number


def _turns(row: Mapping[str, Any], column: str, role: str) -> tuple[Message, ...]:
    """Return messages, or a string as the one message of a role."""
    if isinstance(row.get(column), (list, tuple)):
        return messages_in(row, column)
    return ({"role": role, "content": string_in(row, column)},)


def _parted(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Example, Example]:
    """Return two conversations whose common messages are the prompt."""
    shared = len(_shared(chosen, rejected))
    if shared == min(len(chosen), len(rejected)):
        equal = len(chosen) == len(rejected)
        raise RowError("chosen and rejected are the same" if equal else "one conversation is the beginning of the other")
    if not shared:
        raise RowError("chosen and rejected have no first message in common, so there is no prompt; give it in a column of its own")
    return _joined(chosen[:shared], chosen[shared:], rejected[shared:])


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> Sequence[Message]:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    return tuple(message for message, _ in same)


def _joined(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Example, Example]:
    if list(chosen) == list(rejected):
        raise RowError("chosen and rejected are the same")
    return tuple(Example(_silent(prompt) + _said(response, column)) for response, column in ((chosen, "chosen"), (rejected, "rejected")))


def _silent(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages of which nothing is trained."""
    return tuple({**message, "weight": 0} if message["role"] == "assistant" else message for message in messages)


def _said(messages: Sequence[Message], column: str) -> tuple[Message, ...]:
    """Return a response, which must begin with an assistant's message that says something."""
    if messages[0]["role"] != "assistant":
        raise RowError(f"begins with a message of the {messages[0]['role']}: responses differ in what the assistant says", column=column)
    if not messages[0]["content"].strip() and not messages[0].get("tool_calls"):
        raise RowError("is an empty response", column=column)
    return tuple(messages)


def _dialogue(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    text = string_in(row, column)
    head, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if head.strip() or not parts:
        raise RowError('is no text of turns that begin with "\\n\\nHuman:"; give the prompt in a column of its own', column=column)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True))
