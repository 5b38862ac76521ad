"""Measure a model on data: loss, perplexity, token accuracy, and how many answers it gets exactly right.

  ftjax eval --config=configs/quickstart.py --adapter=runs/quickstart           the held-out data of a config
  ftjax eval --data=tasks:sort --adapter=runs/quickstart                        any data that `ftjax train` reads
  ftjax eval --model=… --data=gsm8k/test.jsonl --metric=numeric_match --max_tokens=200 --output=result.json
  ftjax eval --config=configs/dpo_smollm2_hh.py --adapter=runs/dpo_smollm2_hh   pairs: how often the chosen response is preferred
  ftjax eval --pairs --data=pairs.jsonl --model=runs/reward/model               by a reward model, or by a policy; --reference=…

Loss and accuracy are means over all supervised tokens, whatever the batches. Answers are completed greedily and compared with the row's
`answer`, or with its last assistant message; the interval around their share is Wilson's, at 95 %. Pairs are judged by the rewards of a
reward model, or by the log-probabilities of a policy, alone and against the model without the adapter or `--reference`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftjax import data, losses, peft, scoring
from ftjax.cli import build, environments, measure, objective, preferences, pretrained, products, rollouts, runtime
from ftjax.cli import config as configs
from ftjax.train import Score, make_eval_step
from ftjax.tree import nearest
from ftjax.types import Batch, Model, Params

METRICS = ("auto", *measure.MATCHES)


class Setting(NamedTuple):
    """What is measured on what."""

    name: str
    model: Model
    params: Params
    score: Score
    encoder: data.Encoder
    batches: Iterable[Batch]
    examples: Sequence[data.Example]
    source: str
    max_tokens: int
    batch_size: int
    metric: str
    mesh: Mesh | None = None
    """Of a config."""


def define_flags(flags: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of `ftjax eval`."""
    configs.define(flags, argv)
    pretrained.define_flags(flags)
    absl_flags.DEFINE_string("data", None, "a file, a folder, a hub id or tasks:NAME", flags)
    absl_flags.DEFINE_string("format", "auto", "of the rows: see `ftjax inspect`", flags)
    absl_flags.DEFINE_string("split", "test", "of the data; may end in a slice, as in test[:200]", flags)
    absl_flags.DEFINE_string("template", "auto", "how messages become text: auto, chatml, none, or the Jinja text", flags)
    absl_flags.DEFINE_string("template_variables", "", 'JSON: what the template reads, as in {"enable_thinking": false}', flags)
    absl_flags.DEFINE_integer("row_tokens", 1024, "tokens of a row of the loss's batches; longer examples are cut", flag_values=flags)
    absl_flags.DEFINE_integer("batches", 0, "batches that the loss is measured on; 0: all", flag_values=flags, lower_bound=0)
    absl_flags.DEFINE_integer("examples", None, "answers to complete (default: the config's, else 200); 0: none", 0, flag_values=flags)
    absl_flags.DEFINE_integer("max_tokens", None, "the most tokens of an answer (default: the config's, else 64)", 1, flag_values=flags)
    absl_flags.DEFINE_integer("batch_size", 32, "answers completed at a time", flag_values=flags, lower_bound=1)
    absl_flags.DEFINE_enum("metric", "auto", METRICS, "how answers are compared; auto: the config's, or told from the rows", flags)
    absl_flags.DEFINE_bool("pairs", False, "the data are pairs, of which one response was preferred", flags)
    absl_flags.DEFINE_string("reference", "", "of pairs: the model that a policy is compared with (default: without --adapter)", flags)
    absl_flags.DEFINE_string("output", None, "a .json file for the result", flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Measure, print a table, write the JSON."""
    if (flags.config is None) == (flags.data is None):
        raise ValueError("eval: give either --data=PATH or --config=FILE (whose data.eval_sources are measured).")
    output = runtime.local_path("output", flags.output) if flags.output else None
    if flags.config is not None:
        _check_unused(flags)
        flags.config = build.resolved(flags.config)
    of_pairs = _of_pairs(flags)
    runtime.start(flags)
    found, shown = (preferences.run if of_pairs else run)(flags)
    Console(highlight=False).print(shown)
    if output:
        write_json(output, found)


def run(flags: absl_flags.FlagValues) -> tuple[dict[str, Any], Table]:
    """Return what is measured of conversations, as plain data and for the terminal."""
    setting = from_flags(flags) if flags.config is None else from_config(flags)
    if setting.examples and (said := products.while_decoding(setting.params, rows=setting.batch_size, mesh=setting.mesh)):
        print(said, file=sys.stderr)
    found = evaluate(setting)
    return found, table(found)


_OF_CONFIG = ("dtype", "quantize", "implementation", "format", "split", "template", "template_variables", "row_tokens")


def _check_unused(flags: absl_flags.FlagValues) -> None:
    """Refuse the flags that a config speaks for."""
    if given := [f"--{name}" for name in _OF_CONFIG if flags[name].present]:
        raise ValueError(
            f"eval: {', '.join(given)}: with --config these are fields of the config; change them there, as in "
            "--config.model.dtype=float32 or --config.data.eval_sources.NAME.split=test."
        )


_OF_ANSWERS = ("examples", "max_tokens", "metric")


def _of_pairs(flags: absl_flags.FlagValues) -> bool:
    """Return whether pairs are judged: as asked for, or as the config's objective learns from them."""
    pairs = objective.needs(flags.config).data == data.PAIRS if flags.config is not None else flags.pairs
    if flags.pairs and not pairs:
        raise ValueError(f"eval: --pairs: the config's {flags.config.algorithm!r} has no pairs held out; give --data=PATH instead.")
    if pairs and (given := [f"--{name}" for name in _OF_ANSWERS if flags[name].present]):
        raise ValueError(f"eval: {', '.join(given)}: pairs are read, and nothing is answered.")
    if flags.reference and not pairs:
        raise ValueError("eval: --reference is for pairs; add --pairs, or a config of pairs.")
    return pairs


def from_flags(flags: absl_flags.FlagValues) -> Setting:
    """Return the setting of a command line without a config."""
    source = {"path": flags.data, "format": flags.format, "split": flags.split}
    variables = runtime.json_object("template_variables", flags.template_variables)
    examples = list(data.read(source))  # before the model: a bad row should not have to wait for it
    pretrained.only_folder(flags.adapter)
    adapted = pretrained.load(flags)
    encoder = data.make_encoder(adapted.tokenizer, max_tokens=flags.row_tokens, template=flags.template, template_variables=variables)
    loader, _ = data.load({"data": source}, encoder, batch_size=8, shuffle=False)
    count = 200 if flags.examples is None else flags.examples
    return Setting(
        name=adapted.title,
        model=adapted.model,
        params=adapted.params,
        score=partial(scoring.score, adapted.model, outputs=("logps", "greedy")),
        encoder=encoder,
        batches=itertools.islice(loader.epoch(), flags.batches or None),
        examples=[example for example in examples if data.answer(example)][:count],
        source=f"{flags.data} [{flags.split}]",
        max_tokens=flags.max_tokens or 64,
        batch_size=flags.batch_size,
        metric=flags.metric,
    )


def from_config(flags: absl_flags.FlagValues) -> Setting:
    """Return the setting of a config: its model, its held-out data, its `eval.generate`."""
    config = flags.config
    if environments.used(config):
        raise ValueError("eval: answers are of one turn, and this config's policy is answered; `ftjax train` measures whole episodes.")
    if rollouts.used(config):  # what it was not shown while it learnt by rewards: the answers
        with config.unlocked():
            config.algorithm = "sft"
            del config.rollout
    mesh = build.mesh(config)
    adapted = pretrained.of_config(flags, mesh)
    encoder = build.encoder(config, adapted.tokenizer)
    loader, _ = build.loader(config, encoder, mesh, held_out=True)
    asked = config.eval.generate
    return Setting(
        name=adapted.title,
        model=adapted.model,
        params=adapted.params,
        score=objective.score(config, adapted.model, mesh, ("logps", "greedy")),
        encoder=encoder,
        batches=(build.on_mesh(batch, mesh) for batch in itertools.islice(loader.epoch(), flags.batches or None)),
        examples=build.held_out_examples(config, asked.examples if flags.examples is None else flags.examples),
        source=", ".join(source.path for source in config.data.eval_sources.values()),
        max_tokens=flags.max_tokens or asked.max_tokens,
        batch_size=flags.batch_size,
        metric=asked.metric if flags.metric == "auto" else flags.metric,
        mesh=mesh,
    )


def evaluate(setting: Setting) -> dict[str, Any]:
    """Return everything that is measured, as plain data."""
    found: dict[str, Any] = {"model": setting.name, "data": setting.source}
    if setting.metric not in METRICS:
        raise ValueError(f"eval: there is no metric {setting.metric!r}; nearest: {nearest(setting.metric, METRICS)}.")
    step = make_eval_step(setting.score, peft.chain(), losses.sft)
    tokens = 0.0

    def counted() -> Iterator[Batch]:
        nonlocal tokens
        for batch in setting.batches:
            tokens += float(batch.loss_mask.sum())
            yield batch

    values = measure.evaluate(partial(step, {}, setting.params), counted())
    found |= {"loss": values["nll"], "perplexity": values["perplexity"], "token_accuracy": values["accuracy"], "tokens": int(tokens)}
    if setting.examples:
        found |= _answers(setting)
    return found


def _answers(setting: Setting) -> dict[str, Any]:
    metric = setting.metric
    if metric == "auto":
        metric = "numeric_match" if all("####" in data.answer(example) for example in setting.examples) else "exact_match"
    answers = measure.answer(
        setting.model,
        setting.params,
        setting.encoder,
        setting.examples,
        max_tokens=setting.max_tokens,
        batch_size=setting.batch_size,
        metric=metric,
    )
    judged = [score for score in answers.scores if score is not None]
    low, high = measure.wilson(int(sum(judged)), len(judged))
    return {metric: {"share": answers.score, "low": low, "high": high, "right": int(sum(judged)), "n": len(judged)}}


def table(found: dict[str, Any]) -> Table:
    """Return the result for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(f"{found['model']} on {found['data']}"), title_justify="left")
    for name, justify in (("measure", "left"), ("value", "right"), ("95 % interval", "right"), ("n", "right")):
        shown.add_column(name, justify=justify)
    tokens = f"{found['tokens']:,} tokens"
    shown.add_row("loss", f"{found['loss']:.4f}", "", tokens)
    shown.add_row("perplexity", f"{found['perplexity']:.3f}", "", tokens)
    shown.add_row("token accuracy", f"{found['token_accuracy']:.1%}", "", tokens)
    for name in measure.MATCHES:
        if name in found:
            one = found[name]
            interval = f"{one['low']:.1%} to {one['high']:.1%}"
            shown.add_row(name.replace("_", " "), f"{one['share']:.1%}", interval, f"{one['right']} of {one['n']} answers")
    return shown


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write the result; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial_path, path)
