"""How a model judges pairs: how often the chosen response is the better one to it, with an interval, and by how much.

    reward            r(y_c) - r(y_r)                                     of a reward model
    implicit reward   log π(y_c) / ρ(y_c) - log π(y_r) / ρ(y_r)           of a policy π against a reference ρ: DPO's, without its β
    log-probability   log π(y_c) - log π(y_r)                             of a policy by itself
    per token         log π(y_c) / |y_c| - log π(y_r) / |y_r|             the same, whatever the lengths

A pair counts as right where this margin is above 0, half where it is 0. The interval of the share is Wilson's, that of the mean margin
normal, both at 95 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from rich import box
from rich.table import Table
from rich.text import Text

from ftjax import data, losses, scoring
from ftjax.cli import build, measure, objective, pretrained, runtime
from ftjax.hf import load as hf_load
from ftjax.train import Score
from ftjax.types import VALUE_HEAD, Batch, Model, Params, Scores

ROWS = 4
"""Pairs that are scored at a time."""


class Reader(NamedTuple):
    """A model that reads pairs."""

    score: Score
    params: Params


class Setting(NamedTuple):
    """What is measured on what."""

    name: str
    source: str
    policy: Reader
    reference: Reader | None
    batches: Iterable[Batch]
    """`[b, 2, t]`, chosen first."""
    left_out: int
    """Pairs that could not be used."""


def run(flags: absl_flags.FlagValues) -> tuple[dict[str, Any], Table]:
    """Return what is measured of pairs, as plain data and for the terminal."""
    found = evaluate(from_flags(flags) if flags.config is None else from_config(flags))
    return found, table(found)


def from_flags(flags: absl_flags.FlagValues) -> Setting:
    """Return the setting of a command line without a config."""
    source = {"path": flags.data, "format": flags.format, "split": flags.split}
    variables = runtime.json_object("template_variables", flags.template_variables)
    pretrained.only_folder(flags.adapter)
    adapted = pretrained.load(flags)
    encoder = data.make_encoder(adapted.tokenizer, max_tokens=flags.row_tokens, template=flags.template, template_variables=variables)
    loader, reports = data.load_judged({"data": source}, encoder, wanted=data.PAIRS, batch_size=ROWS, shuffle=False, bad_rows="skip")
    score, base = partial(scoring.score, adapted.model), adapted.base if adapted.adapter else None
    reference = _other(flags.reference, flags.dtype, adapted.model) or (None if base is None else Reader(score, base))
    return Setting(
        name=adapted.title,
        source=f"{flags.data} [{flags.split}]",
        policy=Reader(score, adapted.params),
        reference=reference,
        batches=itertools.islice(loader.epoch(), flags.batches or None),
        left_out=sum(sum(report.skipped.values()) for report in reports.values()),
    )


def from_config(flags: absl_flags.FlagValues) -> Setting:
    """Return the setting of a config of pairs: its model, its held-out data."""
    config = flags.config
    with config.unlocked():
        config.data.update({"packing": "none", "bad_rows": "skip"})
    mesh = build.mesh(config)
    adapted = pretrained.of_config(flags, mesh)
    encoder = build.encoder(config, adapted.tokenizer)
    loader, reports = build.loader(config, encoder, mesh, held_out=True)
    score = partial(objective.score, config, adapted.model, mesh)
    read = lambda params, batch, *, outputs: score(outputs)(params, batch)  # noqa: E731
    return Setting(
        name=adapted.title,
        source=", ".join(source.path for source in config.data.eval_sources.values()),
        policy=Reader(read, adapted.params),
        reference=_other(flags.reference, config.model.dtype, adapted.model) or (Reader(read, adapted.base) if adapted.adapter else None),
        batches=(build.on_mesh(batch, mesh) for batch in itertools.islice(loader.epoch(), flags.batches or None)),
        left_out=sum(sum(report.skipped.values()) for report in reports.values()),
    )


def _other(name: str, dtype: str, policy: Model) -> Reader | None:
    """Return the model of `--reference`, or None."""
    if not name:
        return None
    model, params, _, _ = hf_load.load(name, dtype=build.dtype(dtype))
    if model.config.vocab_size != policy.config.vocab_size:
        raise ValueError(f"--reference: {name} has {model.config.vocab_size:,} tokens and the policy {policy.config.vocab_size:,}.")
    return Reader(partial(scoring.score, model), params)


def evaluate(setting: Setting) -> dict[str, Any]:
    """Return what the model says of the pairs, as plain data.

    Raises:
      ValueError: there is no pair.
    """
    rewarding = VALUE_HEAD in setting.policy.params
    policy, reference = setting.policy, None if rewarding else setting.reference

    @jax.jit
    def judge(params: Params, other: Params | None, batch: Batch) -> dict[str, jax.Array]:
        scores = policy.score(params, batch, outputs=("logps", "values") if rewarding else ("logps",))
        anchor = None if other is None else reference.score(other, batch, outputs=("logps",))
        return margins(scores, batch, anchor)

    found: dict[str, list[np.ndarray]] = {}
    for batch in setting.batches:
        real = np.asarray(batch.segment_ids).any(axis=-1).all(axis=-1)
        for name, values in jax.device_get(judge(policy.params, reference and reference.params, batch)).items():
            found.setdefault(name, []).append(values[real])
    measured = {name: _summary(np.concatenate(values)) for name, values in found.items()}
    if not measured:
        raise ValueError("eval: there is no pair.")
    return {"model": setting.name, "data": setting.source, "left_out": setting.left_out, "preference": measured}


def margins(scores: Scores, batch: Batch, anchor: Scores | None = None) -> dict[str, jax.Array]:
    """Return `{measure: by how much the chosen response is better [b]}` of pairs `[b, 2, t]`: the formulas above.

    Args:
      scores: of the model; with `values` it is a reward model and judged by them alone.
      batch: the pairs.
      anchor: of the reference, if there is one.
    """
    difference = lambda x: x[:, 0] - x[:, 1]  # noqa: E731
    if scores.values is not None:
        return {"reward": difference(losses.response_rewards(scores, batch))}
    total = lambda x: jnp.sum(x.logps * batch.loss_mask, axis=-1)  # noqa: E731
    said, lengths = total(scores), jnp.maximum(jnp.sum(batch.loss_mask, axis=-1), 1)
    implicit = {} if anchor is None else {"implicit reward": difference(said - total(anchor))}
    return {**implicit, "log-probability": difference(said), "per token": difference(said / lengths)}


def _summary(values: np.ndarray) -> dict[str, float]:
    right, n = float((np.sign(values) + 1).sum() / 2), len(values)
    low, high = measure.wilson(right, n)
    half = measure.Z * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    mean = float(values.mean())
    return {
        "share": right / n,
        "low": low,
        "high": high,
        "right": right,
        "n": n,
        "margin": mean,
        "margin_low": mean - half,
        "margin_high": mean + half,
    }


def table(found: Mapping[str, Any]) -> Table:
    """Return the result for the terminal."""
    left_out = f", {found['left_out']} left out" if found["left_out"] else ""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(f"{found['model']} on {found['data']}{left_out}"), title_justify="left")
    for name in ("judged by", "right", "95 % interval", "margin", "95 % interval", "pairs"):
        shown.add_column(name, justify="left" if name == "judged by" else "right")
    for name, one in found["preference"].items():
        interval, margin = f"{one['low']:.1%} to {one['high']:.1%}", f"{one['margin_low']:.3g} to {one['margin_high']:.3g}"
        shown.add_row(name, f"{one['share']:.1%}", interval, f"{one['margin']:.3g}", margin, f"{one['n']:,}")
    return shown
