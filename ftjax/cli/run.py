"""What a run has around its steps, be it one or a sweep: its config, mesh, data and files, and the answers that it is measured by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.text import Text

from ftjax import data, logs, losses
from ftjax.checkpoint import Checkpoints
from ftjax.cli import build, measure, objective, panel, refusals, rollouts, runtime, show
from ftjax.cli import config as configs
from ftjax.cli.stop import Stop
from ftjax.types import TrainState


class Run(NamedTuple):
    """A run before anything is loaded."""

    config: ConfigDict
    config_json: Mapping[str, Any]
    workdir: epath.Path
    checkpoints: Checkpoints
    mesh: Mesh
    terminal: logs.Terminal
    stop: Stop


class Lessons(NamedTuple):
    """What the model learns from and is examined on."""

    encoder: data.Encoder
    loader: data.Loader | data.Prompts
    held_out: data.Loader | data.Prompts | None


def begin(config: ConfigDict, workdir: epath.Path, stop: Stop, *, allow_config_change: bool) -> Run:
    """Return the run, once its config is one that the workdir may go on with: asked before anything is loaded."""
    config = build.resolved(config)
    config_json = configs.as_json(config)
    objective.check_reference(config)
    objective.check_batch(config)
    refusals.check_student(config)
    refusals.check(config)
    objective.check_best_metric(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric)
    runtime.agree("workdir: the last checkpoint", (checkpoints.steps() or [0])[-1])
    if last := checkpoints.last_record(fall_back=config.checkpoint.fall_back):
        configs.check_unchanged(last.config, config_json, allowed=allow_config_change)
    terminal = logs.Terminal(quiet=jax.process_index() != 0)
    mesh = build.mesh(config)
    terminal.say(show.machine(mesh))
    return Run(config, config_json, workdir, checkpoints, mesh, terminal, stop)


def read(run: Run, tokenizer: Any) -> Lessons:
    """Return the batches to learn from and those held out."""
    config, mesh, terminal = run.config, run.mesh, run.terminal
    encoder = build.encoder(config, tokenizer)
    loader, reports = build.loader(config, encoder, mesh)
    held_out = build.loader(config, encoder, mesh, held_out=True)[0] if config.data.eval_sources else None
    terminal.heading("What it learns from")
    if rollouts.used(config):
        for field, found in (("data.sources", loader), ("data.eval_sources", held_out)):
            if found is not None:
                panel.check_columns(config, found.prompts, field=field)
        terminal.say(show.prompts(reports, loader, samples=config.rollout.samples_per_prompt, stride=rollouts.stride(config)))
        if rollouts.unwatched(config):
            terminal.say("the divergence from the start is not watched; rollout.report_kl=True watches it")
        return Lessons(encoder, loader, held_out)
    terminal.say(show.sources(reports, loader))
    if advice := _balance(config, loader):
        terminal.say(Text(advice, style="yellow"))
    terminal.say(show.preview(loader, tokenizer, count=2, console=terminal.console))
    return Lessons(encoder, loader, held_out)


def _balance(config, loader: data.Loader) -> str | None:
    """Return what is wrong with the weights of KTO's two classes, if anything is."""
    if not objective.needs(config).baseline:
        return None
    good = int(loader.numbers["desirable"].sum())
    weights = {name: float(config.loss.get(name, 1.0)) for name in ("desirable_weight", "undesirable_weight")}
    return losses.balance(good, len(loader.numbers["desirable"]) - good, **weights)


def ask(run: Run, quiz: measure.Quiz, state: TrainState, when: str) -> dict[str, Any]:
    """Return the score over the held-out prompts and two of the answers, as plain data; nothing where the config asks for none."""
    asked = run.config.eval.generate
    if not asked.examples:
        return {}
    with run.terminal.console.status(f"answering {asked.examples} held-out prompts {when} training"):
        found = quiz(state, asked.examples)
    judged = sum(score is not None for score in found.scores)
    name = asked.metric.replace("_", " ")
    run.terminal.say(Text.assemble(f"{name} {when} training: ", (f"{found.score:.1%}", "bold"), f" of {judged}"))
    shown = {"completions": found.completions[:2], "prompts": found.prompts[:2], "wanted": found.wanted[:2]}
    return {"score": found.score, "count": judged, **shown}


def open_writers(run: Run, start: int) -> logs.Writers:
    """Return where the metrics of process 0 go from step `start` on; those of the others go nowhere."""
    config, workdir = run.config, run.workdir
    if jax.process_index() != 0:
        return logs.Writers()
    (workdir / "config.json").write_text(json.dumps(run.config_json, indent=1))
    found: list[logs.Writer] = [logs.Jsonl(workdir / "metrics.jsonl", resume_step=start)]
    if config.logging.tensorboard:
        found.append(logs.TensorBoard(workdir / "tensorboard", resume_step=start))
    if config.logging.wandb:
        found.append(logs.Wandb(project=config.logging.wandb_project, folder=workdir, config=run.config_json, name=workdir.name))
    return logs.Writers(found)
