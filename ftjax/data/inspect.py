"""What a person looks at before a run: which text is trained, how long things are, and what seems wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.data.corpus import Report, Sequences
from ftjax.data.formats import Example
from ftjax.data.rows import RowError
from ftjax.data.template import TemplateError
from ftjax.data.tokenize import Encoder, answer


def runs(tokenizer: Any, tokens: np.ndarray, loss_mask: np.ndarray) -> list[tuple[str, bool]]:
    """Return a sequence as alternating runs of text `(text, trained?)`, to be coloured.

    Args:
      tokenizer: decodes.
      tokens: int `[t]`.
      loss_mask: `[t]`.
    """
    trained = np.asarray(loss_mask) > 0
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    pieces = [(first, last) for first, last in zip(borders, borders[1:], strict=False) if last > first]
    return [(tokenizer.decode(np.asarray(tokens[first:last]).tolist()), bool(trained[first])) for first, last in pieces]


def sequence_runs(tokenizer: Any, sequences: Sequences, index: int) -> list[tuple[str, bool]]:
    """Return `runs` of one of many sequences."""
    part = slice(int(sequences.starts[index]), int(sequences.starts[index + 1]))
    return runs(tokenizer, sequences.tokens[part], sequences.loss_mask[part])


def histogram(lengths: np.ndarray, *, bins: int = 10) -> list[tuple[int, int, int]]:
    """Return `(shortest, longest, count)` of equally wide classes of length, both ends included."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // bins))
    counts = np.bincount((lengths - low) // width)
    return [(low + at * width, low + (at + 1) * width - 1, count) for at, count in enumerate(counts.tolist())]


def problems(report: Report, sequences: Sequences, tokenizer: Any) -> list[str]:
    """Return what a person should know of a data set before training on it, worst first; perhaps nothing."""
    found = [f"{count:,} left out: {reason}" for reason, count in report.skipped.most_common()]
    count = len(sequences.lengths)
    if report.cut_responses:
        found.append(f"{report.cut_responses:,} of {count:,} responses were cut, so that their end is not learnt; raise max_tokens")
    if report.cut_prompts:
        found.append(f"{report.cut_prompts:,} of {count:,} prompts were cut from the left")
    thin = int((np.add.reduceat(sequences.loss_mask.astype(np.int64), sequences.starts[:-1]) < 2).sum())
    if thin:
        found.append(f"{thin:,} of {count:,} sequences train a single token: are the answers empty?")
    share = report.supervised / max(1, report.tokens)
    if share < 0.02:
        found.append(f"only {share:.1%} of the tokens are trained")
    twins = count - len({sequences.tokens[a:b].tobytes() for a, b in zip(sequences.starts, sequences.starts[1:], strict=False)})
    if twins:
        found.append(f"{twins:,} of {count:,} sequences are exact copies of others")
    if report.control:
        found.append(f"{report.control:,} of {count:,} examples write special tokens themselves, which are read as such")
    strange = _special_inside(sequences, tokenizer)
    if strange:
        found.append(f"{strange:,} of {count:,} sequences train a special token inside an answer: does the data write it?")
    return found


def prompt_problems(encoder: Encoder, examples: Sequence[Example]) -> list[str]:
    """Return what a person should know of the prompts of some examples: that the model will meet another than it was trained after."""
    rendered, merged = prompt_mismatches(encoder, examples)
    found, of = [], f"of the first {len(examples):,} examples"
    if rendered:
        found.append(
            f"{rendered:,} {of} have something else before the answer than the template's generation prompt, which the model is given"
        )
    if merged:
        found.append(f"{merged:,} {of} have a token that runs from the prompt into the answer, which the prompt alone cannot end with")
    return found


def prompt_mismatches(encoder: Encoder, examples: Sequence[Example]) -> tuple[int, int]:
    """Return how many of the last prompts are another text alone than before their answer, and how many the same text in other tokens.

    There the model meets at inference what it was not trained on: the template's generation prompt differs from what it writes before an
    answer, or a token runs over the border (a generation prompt that ends with a special token avoids that).
    """
    rendered = merged = 0
    for example, sequence in zip(examples, encoder.encode(examples), strict=True):
        if isinstance(sequence, RowError) or sequence.cut or len(example.messages) < 2 or not answer(example):
            continue
        try:
            prompt = encoder.prompt(example)
        except TemplateError:  # it renders the whole conversation alone
            rendered += 1
            continue
        if not np.array_equal(sequence.tokens[: len(prompt)], prompt):
            same = encoder.tokenizer.decode(sequence.tokens.tolist()).startswith(encoder.tokenizer.decode(prompt.tolist()))
            rendered, merged = rendered + (not same), merged + same
    return rendered, merged


def _special_inside(sequences: Sequences, tokenizer: Any) -> int:
    """Count the sequences with a trained special token that does not end its turn: a trained token follows it."""
    special = np.isin(sequences.tokens, np.asarray(tokenizer.all_special_ids, np.int64))
    trained = sequences.loss_mask > 0
    inside = np.flatnonzero((special & trained)[:-1] & trained[1:])
    return len(np.unique(np.searchsorted(sequences.starts, inside, side="right")))
