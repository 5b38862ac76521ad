"""What a run prints about itself: the machine, the model, the data, and at the end what came of it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ftjax import data, logs, sharding, tree
from ftjax.cli import objective, products
from ftjax.cli.build import Loaded
from ftjax.cli.loop import EARLY
from ftjax.data import inspect
from ftjax.hf import adapter as hf_adapter
from ftjax.logs.terminal import megabytes, told
from ftjax.logs.writers import read_jsonl
from ftjax.quant import PackedWeight


def machine(mesh: Mesh) -> str:
    """Return one line about the devices and how they are used."""
    device = mesh.devices.flat[0]
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    kind = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    others = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"JAX {jax.__version__} on {kind}: {mesh.size} of {jax.device_count()} devices{f' ({sizes})' if sizes else ''}{others}"


def model(loaded: Loaded, *, group_tokens: int = 0) -> str:
    """Return one line about the model, and one about its attention where that is not the plain one."""
    leaves = list(map(products.bare, tree.flatten(loaded.params).values()))
    forms = sorted({leaf.format if isinstance(leaf, PackedWeight) else leaf.dtype.name for leaf in leaves})
    size = f"{logs.parameters(loaded.params):,} parameters in {' and '.join(forms)}, {megabytes(tree.num_bytes(loaded.params))}"
    shape, rope = loaded.model.config, loaded.model.config.rope
    kind = "" if rope.rope_type == "default" else f", {rope.rope_type} RoPE × {rope.factor:g}: context {shape.max_position_embeddings:,}"
    groups = f"training attends in groups of {group_tokens:,} tokens, half of the heads in shifted ones (S²); evaluation to all before"
    return f"{loaded.name}: {shape.model_type}, {size}{kind}" + (f"\n{groups}" if group_tokens else "")


def layout(arrays: Any, mesh: Mesh) -> Group:
    """Return the table of the mesh, rule → spec → leaves → parameters → bytes on each device, and what no device could get a part of."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("rule", "left"), ("split over", "left"), ("leaves", "right"), ("parameters", "right"), ("each device", "right")):
        table.add_column(name, justify=justify, overflow="fold")
    rows = sharding.report(arrays, mesh)
    for row in rows:
        axes = ", ".join("-" if entry is None else "*".join(sharding.rules.names(entry)) for entry in row.spec)
        where = axes or Text("every device", "dim")
        table.add_row(Text(row.rule), where, str(row.leaves), f"{row.parameters:,}", megabytes(row.device_bytes))
    dropped = [what for row in rows for what in row.dropped]
    return Group(table, *(Text(f"whole on every device: {what}", style="yellow") for what in dropped))


def sources(reports: Mapping[str, data.Report], loader: data.Loader) -> Group:
    """Return the table of sources: rows, sequences, tokens, how many of them are trained, and why rows were left out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (
        ("source", "left"),
        ("rows", "right"),
        ("sequences", "right"),
        ("tokens", "right"),
        ("trained", "right"),
        ("left out", "right"),
    ):
        table.add_column(name, justify=justify)
    for name, report in reports.items():
        left_out = sum(report.skipped.values())
        cells = (report.rows, report.sequences, report.tokens, report.supervised, left_out)
        table.add_row(Text(name), *(f"{cell:,}" for cell in cells))
    why = [f"{count:,} left out: {reason}" for report in reports.values() for reason, count in report.skipped.most_common(3)]
    share = f"{loader.steps_per_epoch:,} steps an epoch; {loader.efficiency:.0%} of the positions of a batch hold a token"
    return Group(table, *(Text(line, style="yellow") for line in why), share)


def histogram(classes: list[tuple[int, int, int]], *, width: int = 50) -> str:
    """Return bars, one a class of length."""
    most = max(count for _, _, count in classes)
    digits = len(str(classes[-1][1]))
    return "\n".join(
        f"{low:>{digits}}–{high:<{digits}}  {'█' * round(count / most * width):{width}}  {count:,}" for low, high, count in classes
    )


def preview(loader: data.Loader, tokenizer: Any, *, count: int, console: Console) -> Group:
    """Return a few sequences, or pairs of them, the trained tokens in colour (between ⟦ and ⟧ where there is no colour)."""
    shown = {
        index: _coloured(inspect.sequence_runs(tokenizer, loader.sequences, index), marked=not console.is_terminal)
        for index in range(loader.responses * min(count, len(loader.lengths)))
    }
    legend = "the tokens in [bold green]green[/] are trained" if console.is_terminal else "the tokens between ⟦ and ⟧ are trained"
    form = {"box": box.ROUNDED, "border_style": "dim", "title_align": "left"}
    panels = (Panel(text, title=_judgement(loader, index), **form) for index, text in shown.items())
    return Group(*panels, Text.from_markup(f"[dim]{legend}[/]"))


def _judgement(loader: data.Loader, index: int) -> str | None:
    """Return what was judged of a sequence, if anything was."""
    item, at = divmod(index, loader.responses)
    numbers, labels = loader.numbers, loader.sequences.known.get("labels")
    if labels is not None:
        part = slice(*loader.sequences.starts[[index, index + 1]])
        return "steps " + ", ".join(f"{label:g}" for label in labels[part][loader.sequences.loss_mask[part] > 0])
    if "desirable" in numbers:
        return "desirable" if numbers["desirable"][item] else "undesirable"
    margin = f", by {numbers['margins'][item]:g}" if at == 0 and "margins" in numbers else ""
    return f"pair {item + 1}: {('chosen', 'rejected', 'reference')[at]}{margin}" if loader.responses > 1 else None


def _coloured(runs: list[tuple[str, bool]], *, marked: bool, limit: int = 1200) -> Text:
    text = Text()
    for piece, trained in runs:
        piece = f"⟦{piece}⟧" if trained and marked else piece
        text.append(piece, style="bold green" if trained else "dim")
    return text if len(text) <= limit else Text("… ") + text[-limit:]


def prompts(reports: Mapping[str, data.Report], prompts: data.Prompts, *, samples: int, stride: int) -> Group:
    """Return the table of sources of prompts, and what an experience is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("source", "rows", "prompts", "tokens", "left out"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, report in reports.items():
        cells = (report.rows, report.sequences, report.tokens, sum(report.skipped.values()))
        table.add_row(Text(name), *(f"{cell:,}" for cell in cells))
    steps = f"{stride} step{'s' if stride > 1 else ''}"
    return Group(table, f"an experience is {prompts.count} prompts × {samples} samples, and gives {steps}")


def rollouts(rows: list[Mapping[str, Any]]) -> Table:
    """Return samples as a table: prompt, completion, each reward and the advantage."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = list(rows[0]["rewards"]) if rows else []
    for name in ("prompt", "completion", *names, "advantage"):
        table.add_column(name, justify="left" if name in ("prompt", "completion") else "right", overflow="fold")
    for row in rows:
        numbers = (*(row["rewards"][name] for name in names), row["advantage"])
        cells = ("–" if value is None else f"{value:.3g}" for value in numbers)
        table.add_row(Text(_short(row["prompt"], 160)), Text(_short(row["completion"], 200)), *cells)
    return table


def model_title(config) -> str:
    """Return what a plot calls the model: of a path its last part, for a plot is shown where the path means nothing."""
    name = config.model.preset if config.model.random else config.model.name
    return name.rstrip("/").rpartition("/")[2]


def unit(config) -> str:
    """Return what a loss is measured in, where that is the same whatever the objective's options are."""
    tokens = objective.needs(config).data == "messages" and not (
        objective.taught(config) and objective.teacher_block(config).divergence == "uld"
    )
    return "nats per token" if tokens else ""


def picture(workdir: epath.Path, config, rows: Sequence[Mapping[str, Any]], *, subtitle: str) -> epath.Path:
    """Draw the curve of a run and return where it is, or would be: a run that reported nothing, and a sweep, has no curve of its own."""
    metric = "reward" if "rollout" in config else "loss"
    path = workdir / f"{metric}.png"
    if any(f"train/{metric}" in row for row in rows):
        title = f"{model_title(config)}, {' + '.join(config.methods)}"
        logs.loss_curve(rows, path, title=title, subtitle=subtitle, metric=metric, unit=unit(config) if metric == "loss" else "")
    return path


def ending(
    terminal: logs.Terminal, workdir: epath.Path, config, before: Mapping, after: Mapping, *, reason: str, exported, seconds: float
) -> None:
    """Print what came of the run: the match before and after, two completions, the picture and the command to try."""
    terminal.heading("Result")
    gain = f"{config.eval.generate.metric.replace('_', ' ')} {before['score']:.1%} → {after['score']:.1%}" if before and after else ""
    rows = read_jsonl(workdir / "metrics.jsonl")
    drawn = picture(workdir, config, rows, subtitle=gain)
    if before and after:
        terminal.say(Text.assemble((gain, "bold"), f" on {after['count']} held-out prompts that were never trained on"))
        for prompt, wanted, old, new in zip(after["prompts"], after["wanted"], before["completions"], after["completions"], strict=True):
            terminal.panel(f"{prompt}\n\nbefore  {_short(old)}\nafter   {_short(new)}\nright   {_short(wanted)}", "held out")
    for line in progress(rows):
        terminal.say(line)
    minutes = f"{int(seconds) // 60}:{int(seconds) % 60:02d} minutes, at most {logs.peak_memory() / 1e9:.2f} GB of memory"
    terminal.say(f"{reason} after {minutes}")
    terminal.say(f"{drawn.stem + ' curve':13s}{drawn}", soft_wrap=True)
    if exported is not None:
        form = "ftjax's own" if (exported / hf_adapter.CONFIG).exists() else "PEFT"
        terminal.say(f"adapter      {exported}  ({form} format)", soft_wrap=True)
    step = "best" if reason == EARLY else "last"
    if command := _next_command(workdir, config, exported, step=step, prompt=after["prompts"][0] if after else "Hello!"):
        terminal.say(f"{'to use it' if exported is None else 'try it':13s}{command}", soft_wrap=True)


_HELD_OUT = {
    "rewards/accuracy": "pairs right {:.1%}",
    "accuracy": "right {:.1%}",
    "rewards/margin": "margin {:.3g}",
    "divergence": "divergence {:.3g}",
    "agreement": "teacher and student agree {:.1%}",
}
"""What the ending says of held-out data, where an evaluation has it."""


def progress(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each of these metrics: at the first evaluation and at the last."""
    evaluations = [(row["step"], {name.removeprefix("eval/"): row[name] for name in row if name.startswith("eval/")}) for row in rows]
    said = [{name: f"{text} at step {step}" for name, text in told(_HELD_OUT, values).items()} for step, values in evaluations]
    found = {name: [texts[name] for texts in said if name in texts] for name in _HELD_OUT}
    return ["held out: " + " → ".join((texts[0], texts[-1])[: len(texts)]) for texts in found.values() if texts]


def _next_command(workdir: epath.Path, config, exported: epath.Path | None, *, step: str, prompt: str) -> str:
    """Return the command that uses what was trained, as a shell reads it; none for a random model, or an adapter that is not local."""
    if config.model.random or (exported is not None and "://" in str(exported)):
        return ""
    if exported is None:
        output = "model" if "://" in str(workdir) else workdir / "model"
        return shlex.join([*program(), "export", f"--workdir={workdir}", f"--step={step}", f"--output={output}"])
    model_flag = [] if config.model.name == "smollm2-135m-instruct" else [f"--model={config.model.name}"]
    return shlex.join([*program(), "generate", *model_flag, f"--adapter={exported}", f"--prompt={prompt}"])


def program() -> list[str]:
    """Return ftjax as the user called it: its virtual environment may not be active."""
    called = sys.argv[0]
    if Path(called).name != "ftjax":
        return ["python", "-m", "ftjax"]
    return ["ftjax"] if shutil.which("ftjax") == called else [called]


def _short(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " …"
