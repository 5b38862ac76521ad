"""Formats -> messages -> tokens and loss mask -> packed or padded batches, by index and without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ftjax import tree
from ftjax.data.corpus import Report, Sequences, concatenate, encode, examples
from ftjax.data.files import Source
from ftjax.data.formats import Example, parse
from ftjax.data.items import Items, check_labels, joined
from ftjax.data.items import encode as encode_judged
from ftjax.data.items import rows as judged_rows
from ftjax.data.judged import KINDS, LABELLED, PAIRS, STEPS, TRIPLES, Judged
from ftjax.data.judged_batch import Crossing
from ftjax.data.loader import Loader, make_loader
from ftjax.data.mixture import Mixture
from ftjax.data.prompts import ROLLOUTS, Prompt, Prompts
from ftjax.data.prompts import encode as encode_prompts
from ftjax.data.prompts import prompts as prompt_rows
from ftjax.data.rows import RowError
from ftjax.data.sources import open_source
from ftjax.data.template import CHATML, ChatTemplate, TemplateError
from ftjax.data.tokenize import Encoder, answer, make_encoder, right_answer

__all__ = [
    "CHATML",
    "COMPARED",
    "ChatTemplate",
    "Encoder",
    "Example",
    "Items",
    "Judged",
    "KINDS",
    "LABELLED",
    "Loader",
    "PAIRS",
    "Prompt",
    "Prompts",
    "ROLLOUTS",
    "Report",
    "RowError",
    "STEPS",
    "Sequences",
    "Source",
    "TRIPLES",
    "TemplateError",
    "answer",
    "concatenate",
    "encode",
    "examples",
    "load",
    "load_judged",
    "load_prompts",
    "make_encoder",
    "make_loader",
    "open_source",
    "parse",
    "read",
    "read_judged",
    "read_prompts",
    "right_answer",
]


COMPARED = (PAIRS, TRIPLES, LABELLED)
"""The kinds of judged responses whose loss speaks of responses and not of tokens, so that a packed row has to be taken apart."""
SPEC = ("path", "format", "split", "name", "columns", "end_marker", "weight")


def read(spec: Mapping[str, Any], *, bad_rows: str = "raise", report: Report | None = None) -> Iterator[Example]:
    """Yield the examples of one source.

    Args:
      spec: `{"path": …}` and, where wanted, `format`, `split`, `name`, `columns` and `end_marker`: see `sources.open_source` and
        `formats.parse`.
      bad_rows: "raise", or "skip" and count.
      report: counts.
    """
    return examples(_opened(spec), **_reading(spec), bad_rows=bad_rows, report=report)


def load(
    sources: Mapping[str, Mapping[str, Any]],
    encoder: Encoder,
    *,
    batch_size: int,
    packing: str = "best_fit",
    seed: int = 0,
    shuffle: bool = True,
    bad_rows: str = "raise",
    unsupervised: str = "skip",
) -> tuple[Loader, dict[str, Report]]:
    """Return the loader of several sources and what became of their rows.

    Args:
      sources: name -> what `read` takes, and a `weight`: either every source has one or none has.
      encoder: from `make_encoder(tokenizer, max_tokens=…)`; its `max_tokens` is the width of the rows.
      batch_size: rows of a batch over all hosts.
      packing: "best_fit", "none" or "wrapped".
      seed: of the order.
      shuffle: False keeps the order of the rows (evaluation).
      bad_rows: "raise" at a row that cannot be used, or "skip" and count.
      unsupervised: the same for a row of which no token would be trained.

    Raises:
      RowError: a row cannot be used; the message names file, line, column and reason.
      ValueError: a source is missing or empty, or nothing in it would be trained.
    """
    weights = _weights(sources)
    parts, reports = [], {name: Report() for name in sources}
    for name, spec in sources.items():
        rows = read(spec, bad_rows=bad_rows, report=reports[name])
        parts.append(encode(rows, encoder, bad_rows=bad_rows, unsupervised=unsupervised, report=reports[name]))
    sizes = tuple(len(part.lengths) for part in parts)
    return (
        make_loader(
            concatenate(parts),
            batch_size=batch_size,
            max_tokens=encoder.max_tokens,
            packing=packing,
            seed=seed,
            sizes=sizes,
            weights=weights,
            shuffle=shuffle,
        ),
        reports,
    )


def read_judged(spec: Mapping[str, Any], wanted: str, *, bad_rows: str = "raise", report: Report | None = None) -> Iterator[Judged]:
    """Yield the judged responses of one source: as `read`, of the formats of `judged.FORMATS`; `wanted` is one of `KINDS`."""
    return judged_rows(_opened(spec), wanted, **_reading(spec), bad_rows=bad_rows, report=report)


def load_judged(
    sources: Mapping[str, Mapping[str, Any]],
    encoder: Encoder,
    *,
    wanted: str,
    batch_size: int,
    packing: str = "none",
    seed: int = 0,
    shuffle: bool = True,
    bad_rows: str = "raise",
    mismatched: bool = False,
    both_classes: bool = True,
) -> tuple[Loader, dict[str, Report]]:
    """Return the loader of judged responses and what became of their rows; arguments as in `load`.

    Args:
      sources: name -> what `read` takes.
      encoder: its `max_tokens` holds for a prompt with one response.
      wanted: `PAIRS`: batches `[batch_size, 2, t]`, chosen first; `TRIPLES`: `[batch_size, 3, t]`, the best known one last; `LABELLED`:
        `[batch_size, t]` with `desirable`; or `STEPS`: `[batch_size, t]` with `labels`, whose `loss_mask` is 1 at the end of each step.
      batch_size: items of a batch over all hosts, or packed rows.
      packing: "none", or "best_fit": rows as wide as all responses of an item may be, with as many items as fit; of what is `COMPARED`, for
        `losses.unpacked`. "shared": likewise, and the prompt of an item stands before its responses once (see `types.BRANCH`).
      seed: of the order.
      shuffle: False keeps the order of the rows.
      bad_rows: "raise" at a row that cannot be used, or "skip" and count.
      mismatched: beside single responses, each prompt with the response of another prompt of its batch (KTO's baseline); the row is empty,
        and counts for nothing, where the batch has no other.
      both_classes: refuse single responses of one class; False: undesirable ones alone will do, which are to be forgotten.
    """
    if packing == "wrapped":
        raise ValueError("data: packing is 'wrapped', which cuts sequences; judged responses take 'shared', 'best_fit' or 'none'.")
    weights = _weights(sources)
    parts, reports = [], {name: Report() for name in sources}
    for name, spec in sources.items():
        found = read_judged(spec, wanted, bad_rows=bad_rows, report=reports[name])
        parts.append(encode_judged(found, encoder, bad_rows=bad_rows, report=reports[name]))
    items = joined(parts)
    check_labels(items, both_classes=both_classes)
    options = {"batch_size": batch_size, "max_tokens": encoder.max_tokens, "packing": packing, "seed": seed, "shuffle": shuffle}
    sizes = tuple(len(part.lengths) for part in parts)
    crossing = Crossing(items.prompts, keep=len(encoder.bos)) if mismatched else None
    judged = {"responses": items.responses, "numbers": items.numbers, "crossing": crossing}
    return make_loader(items.sequences, **options, sizes=sizes, weights=weights, **judged), reports


def read_prompts(spec: Mapping[str, Any], *, bad_rows: str = "raise", report: Report | None = None) -> Iterator[Example]:
    """Yield the prompts of one source: as `read`, and rows of a `prompt` alone too."""
    return prompt_rows(_opened(spec), **_reading(spec), bad_rows=bad_rows, report=report)


def load_prompts(
    sources: Mapping[str, Mapping[str, Any]],
    encoder: Encoder,
    *,
    count: int,
    max_tokens: int,
    change: Callable[[Example], Example] = lambda example: example,
    seed: int = 0,
    shuffle: bool = True,
    bad_rows: str = "raise",
) -> tuple[Prompts, dict[str, Report]]:
    """Return prompts by index and what became of their rows; arguments as in `load`.

    Args:
      sources: name -> what `read` takes, and perhaps a `weight`.
      encoder: its `max_tokens` holds for a prompt with its answer.
      count: prompts at a time.
      max_tokens: of an answer.
      change: what is done to each before it is encoded: tools or an environment's first words are added.
      seed: of the order.
      shuffle: False keeps the order of the rows.
      bad_rows: "raise" at a row that cannot be used, or "skip" and count.
    """
    weights, parts, reports = _weights(sources), [], {name: Report() for name in sources}
    for name, spec in sources.items():
        found = map(change, read_prompts(spec, bad_rows=bad_rows, report=reports[name]))
        parts.append(encode_prompts(found, encoder, max_tokens=max_tokens, bad_rows=bad_rows, report=reports[name]))
    sizes = tuple(map(len, parts))
    first = np.cumsum([0, *sizes[:-1]])
    return Prompts([prompt for part in parts for prompt in part], Mixture(sizes, weights, seed, shuffle), first, count), reports


def _opened(spec: Mapping[str, Any]) -> Source:
    """Return the rows of a source.

    Raises:
      ValueError: it has a setting that there is not.
    """
    for key in spec:
        if key not in SPEC:
            raise ValueError(f"data: a source has no setting {key!r}; nearest: {tree.nearest(key, SPEC)}")
    return open_source(spec["path"], split=spec.get("split") or "train", name=spec.get("name") or None)


def _reading(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": spec.get("format") or "auto", "columns": spec.get("columns"), "end_marker": spec.get("end_marker") or ""}


def _weights(sources: Mapping[str, Mapping[str, Any]]) -> tuple[float, ...] | None:
    if not sources:
        raise ValueError("data: no source is given; set data.sources to {name: {'path': …}}")
    weights = tuple(float(spec["weight"]) for spec in sources.values() if spec.get("weight") is not None)
    if weights and len(weights) < len(sources):
        missing = [name for name, spec in sources.items() if spec.get("weight") is None]
        raise ValueError(f"data: either every source has a weight or none has; without one: {missing}")
    return weights or None
