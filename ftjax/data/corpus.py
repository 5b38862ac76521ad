"""From rows to sequences, with an account of what was cut or left out on the way."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ftjax import tree
from ftjax.data import formats
from ftjax.data.files import Source
from ftjax.data.formats import Example
from ftjax.data.rows import RowError
from ftjax.data.tokenize import Encoder

BAD_ROWS = ("raise", "skip")


class Sequences(NamedTuple):
    """Many sequences end to end: sequence `i` is `tokens[starts[i] : starts[i + 1]]`."""

    tokens: np.ndarray
    """int32 `[all tokens]`."""
    loss_mask: np.ndarray
    """uint8 `[all tokens]`."""
    starts: np.ndarray
    """int64 `[sequences + 1]`."""
    known: Mapping[str, np.ndarray] = MappingProxyType({})
    """`{field of Batch: float32 [all tokens]}`: what else is known of each token."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[sequences]`."""
        return np.diff(self.starts)

    @property
    def sha256(self) -> str:
        """Of tokens, masks and starts, in which rows, template, tokenizer and cuts all show."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.loss_mask, self.starts):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def part(self, first: int, last: int) -> Sequences:
        """Return the sequences from `first` on, before `last`, without what else is known of them."""
        tokens = slice(self.starts[first], self.starts[last])
        return Sequences(self.tokens[tokens], self.loss_mask[tokens], self.starts[first : last + 1] - self.starts[first])


@dataclasses.dataclass
class Report:
    """What became of the rows of a source."""

    rows: int = 0
    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    control: int = 0
    """Examples whose own text holds special tokens: `<|im_end|>` in a user's message ends that turn."""
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Reason -> rows or examples left out for it."""
    first_errors: list[str] = dataclasses.field(default_factory=list)

    def skip(self, reason: str, message: str) -> None:
        """Count one example that was left out."""
        self.skipped[reason] += 1
        if len(self.first_errors) < 5:
            self.first_errors.append(message)

    def nothing(self, what: str) -> ValueError:
        """Return the error that there is nothing to learn from: of so many `what`, and why."""
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common(5)) or "there was none"
        return ValueError(f"data: of {self.examples:,} {what}: {reasons}. First: {self.first_errors[:1]}")

    def __add__(self, other: Report) -> Report:
        return Report(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)})


def examples(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    end_marker: str = "",
    bad_rows: str = "raise",
    report: Report | None = None,
) -> Iterator[Example]:
    """Yield the examples of a source, in order.

    Args:
      source: rows by index.
      format: a name from `formats.FORMATS`, or "auto": told from each row's columns, so that a file may mix formats.
      columns: see `formats.parse`.
      end_marker: see `formats.parse`.
      bad_rows: "raise", or "skip" to count rows that cannot be read and go on.
      report: counts rows and skips.

    Raises:
      RowError: a row cannot be read and `bad_rows` is "raise".
    """
    parse = partial(formats.parse, format=format, columns=columns, end_marker=end_marker)
    yield from parsed(source, parse, bad_rows=bad_rows, report=report)


def parsed(source: Source, parse: Callable[..., Sequence[Any]], *, bad_rows: str, report: Report | None) -> Iterator[Any]:
    """Yield what `parse(row, where=…)` makes of the rows of a source, in order; see `examples` for the rest."""
    check_policy(bad_rows)
    report = report or Report()
    for at in range(source.size):
        report.rows += 1
        try:
            found = parse(source.read(at), where=source.where(at))
        except RowError as error:
            bad(error, bad_rows, report)
            continue
        report.examples += len(found)
        yield from found


def encode(
    rows: Iterable[Example], encoder: Encoder, *, bad_rows: str = "raise", unsupervised: str = "skip", report: Report | None = None
) -> Sequences:
    """Return the sequences of some examples.

    Args:
      rows: examples.
      encoder: how they become tokens.
      bad_rows: what to do with an example that the template cannot render or mask, "raise" or "skip".
      unsupervised: what to do with an example of which no token is trained, "skip" (and count) or "raise".
      report: counts.

    Raises:
      RowError: see `bad_rows` and `unsupervised`.
      ValueError: no token of all the examples is trained.
    """
    for policy in (bad_rows, unsupervised):
        check_policy(policy)
    report = report or Report()
    kept = []
    for chunk in chunks(iter(rows), 512):
        for example, encoded in zip(chunk, encoder.encode(chunk), strict=True):
            if isinstance(encoded, RowError):
                bad(encoded, bad_rows, report)
                continue
            if not encoded.loss_mask.any():
                reason = "no token of it would be trained: it is empty, or no assistant message has weight 1"
                bad(RowError(reason, where=example.where), unsupervised, report)
                continue
            report.control += encoder.holds_control(example)
            report.cut_prompts += encoded.cut == "prompt"
            report.cut_responses += encoded.cut == "response"
            kept.append(encoded)
    if not kept:
        raise report.nothing("examples no token would be trained")
    sequences = Sequences(
        np.concatenate([sequence.tokens for sequence in kept]),
        np.concatenate([sequence.loss_mask for sequence in kept]),
        np.cumsum([0, *(len(sequence.tokens) for sequence in kept)]),
    )
    report.sequences += len(kept)
    report.tokens += len(sequences.tokens)
    report.supervised += int(sequences.loss_mask.sum(dtype=np.int64))
    return sequences


def concatenate(parts: Iterable[Sequences]) -> Sequences:
    """Return the sequences of all parts, one part after the other; of each the same has to be known."""
    parts = list(parts)
    lengths = np.concatenate([part.lengths for part in parts])
    tokens, mask = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "loss_mask"))
    known = {name: np.concatenate([part.known[name] for part in parts]) for name in parts[0].known}
    return Sequences(tokens, mask, np.concatenate([[0], np.cumsum(lengths)]), known)


def bad(error: RowError, policy: str, report: Report) -> None:
    """Raise the error, or count it."""
    if policy == "raise":
        raise error
    report.skip(error.reason.split(";")[0][:80], str(error))


def check_policy(policy: str) -> None:
    """Refuse what is not of `BAD_ROWS`."""
    if policy not in BAD_ROWS:
        raise ValueError(f"data: bad rows can be treated by {BAD_ROWS}, not {policy!r}; nearest: {tree.nearest(policy, BAD_ROWS)}")


def chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of up to `size` items."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk
