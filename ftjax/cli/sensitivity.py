"""Say which matrices suffer most from a format of 4 or 8 bits, before training over them.

  ftjax sensitivity --config=configs/quickstart.py --format=nf4 --share=0.1

For each kind of matrix: the relative error of its numbers, the layer where that is largest, and what the loss of some training batches
rises by when this kind alone is quantised. Then the flags that leave the worst of them, up to a share of all numbers, in another format,
or with --rest=bfloat16 as they are. --output=FILE.jsonl has the error of every layer.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from rich import box
from rich.console import Console
from rich.table import Table

from ftjax import logs, quant
from ftjax.cli import build, objective, runtime
from ftjax.cli import config as configs
from ftjax.quant import sensitivity
from ftjax.types import Batch, Mean, Params

DENSE = "bfloat16"
"""What --rest calls matrices that are not quantised."""


def define_flags(flags: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of `ftjax sensitivity`."""
    configs.define(flags, argv)
    absl_flags.DEFINE_enum("format", "nf4", list(quant.METHODS), "the format; the rest is in the config's block of that name", flags)
    absl_flags.DEFINE_enum("rest", "int8", [*quant.METHODS, DENSE], f"the format of the worst; {DENSE}: none, they stay dense", flags)
    absl_flags.DEFINE_float("share", 0.1, "of the numbers, which may be in the other format", 0, 1, flag_values=flags)
    absl_flags.DEFINE_integer("batches", 4, "of the training, that the loss is measured on; 0: errors alone", 0, flag_values=flags)
    absl_flags.DEFINE_string("output", None, "a .jsonl file for the error of every layer: a line for each kind", flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Print the report and the flags."""
    output = runtime.local_path("output", flags.output) if flags.output else None
    if flags.config is None:
        raise ValueError("sensitivity: --config=FILE is needed, as in: ftjax sensitivity --config=configs/quickstart.py")
    runtime.start(flags)
    config = flags.config
    config.methods = tuple(name for name in config.methods if name not in quant.METHODS) or ("lora",)  # the model is wanted dense
    mesh, options = build.mesh(config), configs.plain(config[flags.format])
    loaded = build.model(config, mesh)
    read = objective.reading(config, loaded.model, mesh)

    def loss(params: Params, batch: Batch) -> Mean:
        return read(params, params, batch)[0]

    batches = []
    if flags.batches:
        loader, _ = build.loader(config, build.encoder(config, loaded.tokenizer), mesh)
        batches = [build.on_mesh(batch, mesh) for batch in itertools.islice(map(loader.batch, itertools.count()), flags.batches)]
    options = {name: options[name] for name in ("targets", "group", "nested")}
    rows = sensitivity.report(loaded.params, flags.format, loss=loss if batches else None, batches=batches, **options)
    terminal = logs.Terminal(console=Console(highlight=False))
    terminal.heading(f"What {flags.format} does to {loaded.name}")
    terminal.say(table(rows))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(line) + "\n" for line in lines(rows)), encoding="utf-8")
        terminal.say(f"every layer's error: {output}", soft_wrap=True)
    worst = sensitivity.worst(rows, share=flags.share)
    terminal.heading(f"To leave the worst {flags.share:.0%} at most in {flags.rest}")
    fields = {f"{flags.format}.exclude": worst} | ({} if flags.rest == DENSE else {f"{flags.rest}.targets": worst})
    fields["methods"] = str(tuple(dict.fromkeys((flags.format, *([] if flags.rest == DENSE else [flags.rest]), *config.methods))))
    terminal.say(shlex.join(f"--config.{name}={value}" for name, value in fields.items()), soft_wrap=True)


def lines(rows: Sequence[sensitivity.Row]) -> list[dict[str, Any]]:
    """Return the report as plain data: of each kind the errors of its layers, the first layer first."""
    return [{"kind": row.path, "numbers": row.size, "errors": row.errors, "loss_rise": row.rise} for row in rows]


def table(rows: Sequence[sensitivity.Row]) -> Table:
    """Return a line for each kind of matrix."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kind", "numbers", "relative error", "worst layer", "loss rises by"):
        shown.add_column(name, justify="left" if name == "kind" else "right", overflow="fold")
    for row in rows:
        layer = max(range(len(row.errors)), key=row.errors.__getitem__)
        rise = "not measured" if row.rise is None else f"{row.rise:+.5f}"
        shown.add_row(row.path, f"{row.size:,}", f"{row.error:.4f}", f"{layer}: {row.errors[layer]:.4f}", rise)
    return shown
