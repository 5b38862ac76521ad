"""From rows of judged responses to items: as many sequences each as there are responses to compare, and the numbers that go with them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ftjax.data import judged
from ftjax.data.beginnings import shared
from ftjax.data.corpus import Report, Sequences, bad, check_policy, chunks, concatenate, parsed
from ftjax.data.files import Source
from ftjax.data.judged import Judged
from ftjax.data.rows import RowError
from ftjax.data.tokenize import Encoded, Encoder

UNCUT = 2**31
"""More tokens than any sequence has."""
UNKNOWN = {"density_ratios": 1.0}
"""What a number counts as where it is not given, if not 0."""


class Items(NamedTuple):
    """Item `i` is the sequences `i · responses` to `(i + 1) · responses`."""

    sequences: Sequences
    responses: int
    numbers: Mapping[str, np.ndarray]
    """`{field of Batch: float32 [items]}`."""
    prompts: np.ndarray
    """int64 `[items]`: equal where two items have the same prompt, as text and before it was cut."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[items]`: tokens of the longest response of each, its prompt included."""
        return self.sequences.lengths.reshape(-1, self.responses).max(axis=1)


def rows(
    source: Source,
    wanted: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    end_marker: str = "",
    bad_rows: str = "raise",
    report: Report | None = None,
) -> Iterator[Judged]:
    """Yield the judged responses of a source, in order: see `judged.parse`.

    Raises:
      RowError: a row cannot be used and `bad_rows` is "raise".
    """
    parse = partial(judged.parse, wanted=wanted, format=format, columns=columns, end_marker=end_marker)
    yield from parsed(source, parse, bad_rows=bad_rows, report=report)


def encode(
    found: Iterable[Judged], encoder: Encoder, *, bad_rows: str = "raise", too_long: str = "skip", report: Report | None = None
) -> Items:
    """Return the items of some judged responses.

    The responses of an item follow the same tokens of their prompt: where the tokenizer joins its end to one of them, that end is part of
    each (TRL's rule too), so the log-probabilities that are compared are those of texts that begin at one place, and no token is cut. The
    prompt is cut from the left, by as much for all, until the longest of them fits.

    Args:
      found: of one kind.
      encoder: how they become tokens; its `max_tokens` holds for prompt and response together.
      bad_rows: what to do with what the template cannot render, "raise" or "skip".
      too_long: the same for a response that does not fit: it is never cut.
      report: counts.

    Raises:
      RowError: see `bad_rows` and `too_long`.
      ValueError: nothing is left, or of single responses only good or only bad ones.
    """
    for policy in (bad_rows, too_long):
        check_policy(policy)
    report, whole = report or Report(), dataclasses.replace(encoder, max_tokens=UNCUT)
    kept: list[list[Encoded]] = []
    numbers: list[Mapping[str, float]] = []
    labels: list[np.ndarray] = []
    prompts: list[int] = []
    for chunk in chunks(iter(found), 256):
        encoded = iter(whole.encode([example for item in chunk for example in item.responses]))
        for item in chunk:
            responses: list[Any] = list(itertools.islice(encoded, len(item.responses)))
            where = item.responses[0].where
            if errors := [one for one in responses if isinstance(one, RowError)]:
                bad(errors[0], bad_rows, report)
            elif not all(one.loss_mask.any() for one in responses):
                bad(RowError("a response has no token that would be trained", where=where), bad_rows, report)
            elif item.labels and responses[0].ends.sum() < len(item.labels):
                bad(RowError("two steps end in one token", where=where), bad_rows, report)
            elif (aligned := _after_one_prompt(responses)) is None:
                reason = "the tokenizer joins all of the prompt to a response; use a chat template, or end the prompt with a line break"
                bad(RowError(reason, where=where), bad_rows, report)
            elif (fitting := _cut_together(aligned, encoder.max_tokens, keep=len(encoder.bos))) is None:
                bad(RowError(f"a response does not fit max_tokens={encoder.max_tokens}", where=where), too_long, report)
            else:
                report.cut_prompts += fitting[0].cut == "prompt"
                report.control += any(encoder.holds_control(example) for example in item.responses)
                if item.labels:
                    fitting, of_tokens = _labelled(fitting[0], item.labels)
                    labels.append(of_tokens)
                kept.append(fitting)
                numbers.append(item.numbers)
                prompts.append(_hash(responses[0].prompt))
    if not kept:
        raise report.nothing("judged responses none can be used")
    sequences = [one for item in kept for one in item]
    tokens, masks = (np.concatenate([getattr(one, name) for one in sequences]) for name in ("tokens", "loss_mask"))
    report.sequences += len(sequences)
    report.tokens += len(tokens)
    report.supervised += int(masks.sum(dtype=np.int64))
    starts = np.cumsum([0, *(len(one.tokens) for one in sequences)])
    known = {"labels": np.concatenate(labels)} if labels else {}
    return Items(Sequences(tokens, masks, starts, known), len(kept[0]), _columns(numbers), np.asarray(prompts, np.int64))


def joined(parts: Iterable[Items]) -> Items:
    """Return the items of all parts, one part after the other; a number that some parts have not is 0 there, or what `UNKNOWN` says."""
    parts = list(parts)
    names = {name for part in parts for name in part.numbers}
    numbers = {
        name: np.concatenate([part.numbers.get(name, np.full(len(part.lengths), UNKNOWN.get(name, 0), np.float32)) for part in parts])
        for name in sorted(names)
    }
    prompts = np.concatenate([part.prompts for part in parts])
    return Items(concatenate([part.sequences for part in parts]), parts[0].responses, numbers, prompts)


def check_labels(items: Items, *, both_classes: bool) -> None:
    """Refuse single responses that are all good, or all bad where both classes are needed."""
    labels = items.numbers.get("desirable")
    if labels is None or len(set(labels.tolist())) > 1 or not (both_classes or labels[0]):
        return
    which = "desirable" if labels[0] else "undesirable"
    lacking = "the other class is needed too, to learn the difference" if both_classes else "what is to be forgotten has the label false"
    raise ValueError(f"data: all {len(labels):,} responses are {which}; {lacking}.")


def _labelled(response: Encoded, labels: Sequence[float]) -> tuple[list[Encoded], np.ndarray]:
    """Return the response of which the last token of each step counts alone, and the labels of the steps there, float32 `[t]`."""
    values = np.zeros(len(response.tokens), np.float32)
    values[response.ends > 0] = labels
    return [response._replace(loss_mask=response.ends)], values


def _columns(numbers: list[Mapping[str, float]]) -> dict[str, np.ndarray]:
    names = sorted({name for one in numbers for name in one})
    return {name: np.asarray([one.get(name, UNKNOWN.get(name, 0.0)) for one in numbers], np.float32) for name in names}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _after_one_prompt(responses: list[Encoded]) -> list[Encoded] | None:
    """Return the responses, trained from where their tokens part; None if they part at once.

    Those that answer different texts (turns of their own stand before what is trained) stay as they are.
    """
    firsts = [int(np.argmax(one.loss_mask)) for one in responses]
    size = shared([one.tokens for one in responses], min(firsts))
    if size == max(firsts) or len({one.prompt for one in responses}) > 1:
        return responses
    if not size:
        return None

    def begun(one: Encoded, first: int) -> Encoded:
        return one._replace(loss_mask=np.concatenate([one.loss_mask[:size], np.ones(first - size, np.uint8), one.loss_mask[first:]]))

    return [begun(one, first) for one, first in zip(responses, firsts, strict=True)]


def _cut_together(responses: list[Encoded], max_tokens: int, *, keep: int) -> list[Encoded] | None:
    """Return the responses with as much of the front of their prompt cut off as the longest needs; None if a response does not fit."""
    excess = max(len(one.tokens) for one in responses) - max_tokens
    if excess <= 0:
        return responses
    keep = min(keep, min(len(one.tokens) for one in responses))
    prompt = min(int(np.argmax(one.loss_mask)) for one in responses)
    if prompt - keep - excess < (0 if keep else 1):  # something must stay to predict the first token of the response from
        return None
    first = keep + excess

    def cut(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else np.concatenate([x[:keep], x[first:]])

    return [Encoded(cut(one.tokens), cut(one.loss_mask), "prompt", cut(one.ends)) for one in responses]
