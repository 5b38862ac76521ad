"""Prompts by index, for a policy that writes its own answers: the tokens to continue, and the row that a reward may look at.

Rows are those of `ftjax.data.formats`, of which the last answer is not trained but kept for the reward, or rows of a `prompt` (a text or
messages) and whatever columns a reward wants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ftjax.data import formats
from ftjax.data.corpus import Report, bad, check_policy, parsed
from ftjax.data.files import Source
from ftjax.data.formats import Example, Message
from ftjax.data.mixture import Mixture
from ftjax.data.rows import RowError
from ftjax.data.template import TemplateError
from ftjax.data.tokenize import Encoder, right_answer

ROLLOUTS = "rollouts"
"""What an objective learns from that samples its own answers to prompts."""


class Prompt(NamedTuple):
    """What is asked."""

    tokens: np.ndarray
    """int32 `[t]`: what the policy is given, up to where it writes."""
    example: Example

    @property
    def text(self) -> str:
        """The last message before the answer."""
        messages = [message for message in self.example.messages if message["role"] != "assistant"]
        return messages[-1]["content"] if messages else ""

    @property
    def asked(self) -> str | list[Message]:
        """What a reward is shown: the text of a single message, or all messages before the answer."""
        messages = self.messages
        return messages[0]["content"] if len(messages) == 1 else messages

    @property
    def messages(self) -> list[Message]:
        """All messages before the answer."""
        whole = self.example.messages
        return list(whole[:-1] if whole[-1]["role"] == "assistant" else whole)

    @property
    def columns(self) -> Mapping[str, Any]:
        """The row, with the `answer` that counts as right: its own column, or what the last assistant message says."""
        return {**self.example.columns, "answer": right_answer(self.example)}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of each experience: `at(index)` is a pure function of (rows, count, seed, index)."""

    prompts: Sequence[Prompt]
    """Of all sources, one after the other."""
    mixture: Mixture
    first: np.ndarray
    """int `[sources]`: the first prompt of each source."""
    count: int
    """Prompts at a time."""

    def at(self, index: int, *, round: int = 0) -> list[Prompt]:
        """Return the prompts of experience `index`; those of a later round, in an order of their own, stand in for some of them."""
        mixture = dataclasses.replace(self.mixture, seed=self.mixture.seed + (round << 40))
        source, row = mixture.draw(np.arange(index * self.count, (index + 1) * self.count))
        return [self.prompts[at] for at in (self.first[source] + row).tolist()]

    @property
    def steps_per_epoch(self) -> int:
        """Experiences until every prompt has come once, at the least."""
        return -(-self.mixture.epoch_size // self.count)


def prompts(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    end_marker: str = "",
    bad_rows: str = "raise",
    report: Report | None = None,
) -> Iterator[Example]:
    """Yield the rows of a source as examples that end where the policy is to write, or with an answer that it does not see.

    Args:
      source: rows by index.
      format: a name from `formats.FORMATS`, "prompt" for rows of a `prompt` without an answer to train, or "auto".
      columns: the format's column names -> the names that this data set uses.
      end_marker: see `formats.parse`.
      bad_rows: "raise", or "skip" to count rows that cannot be read and go on.
      report: counts.

    Raises:
      RowError: a row cannot be read and `bad_rows` is "raise".
    """
    parse = partial(_parse, format=format, columns=columns, end_marker=end_marker)
    yield from parsed(source, parse, bad_rows=bad_rows, report=report)


def encode(
    examples: Iterable[Example], encoder: Encoder, *, max_tokens: int, bad_rows: str = "raise", report: Report | None = None
) -> list[Prompt]:
    """Return the prompts of some examples; one that leaves no room for its answer is left out, and counted.

    Args:
      examples: of `prompts`.
      encoder: how messages become tokens; its `max_tokens` is for prompt and answer together.
      max_tokens: of an answer.
      bad_rows: what to do with what the template cannot render, "raise" or "skip".
      report: counts.

    Raises:
      ValueError: no prompt is left.
    """
    check_policy(bad_rows)
    report, kept = report or Report(), []
    for example in examples:
        try:
            tokens = encoder.prompt(example)
        except (RowError, TemplateError) as error:
            bad(error if isinstance(error, RowError) else RowError(str(error), where=example.where), bad_rows, report)
            continue
        if len(tokens) + max_tokens > encoder.max_tokens:
            reason = f"{max_tokens} tokens of answer do not fit behind it in max_tokens={encoder.max_tokens}"
            report.skip(reason, f"{example.where}: {len(tokens)} tokens: {reason}")
            continue
        report.control += encoder.holds_control(example)
        report.sequences += 1
        report.tokens += len(tokens)
        kept.append(Prompt(tokens, example))
    if not kept:
        raise report.nothing("prompts none can be used")
    return kept


def _parse(row: Mapping[str, Any], *, format: str, columns: Mapping[str, str] | None, end_marker: str, where: str) -> list[Example]:
    renamed = {**row, **{name: row[theirs] for name, theirs in (columns or {}).items() if theirs in row}}
    bare = format == "auto" and "prompt" in renamed and not {"completion", "messages", "conversations"} & renamed.keys()
    if format != "prompt" and not bare:
        return formats.parse(row, format=format, columns=columns, end_marker=end_marker, where=where)
    try:
        chat = isinstance(renamed.get("prompt"), (list, tuple))
        messages = formats.messages_in(renamed, "prompt") if chat else ({"role": "user", "content": formats.string_in(renamed, "prompt")},)
    except RowError as error:
        raise error.at(where) from None
    if messages[-1]["role"] == "assistant":
        raise RowError("ends with what an assistant says: there is nothing to answer", column="prompt", where=where)
    return [Example(tuple(messages), columns=dict(row), where=where)]
