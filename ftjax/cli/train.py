"""Fine-tune a model as a config says.

  ftjax train --config=configs/quickstart.py --workdir=runs/quickstart
  ftjax train --config=configs/quickstart.py:smoke --workdir=/tmp/smoke        a few seconds, with a tiny random model
  ftjax train --config=… --workdir=… --config.optimizer.learning_rate=3e-4     any field of the config

The same command in the same workdir goes on where it stopped, with the same bits as if it never had. SIGTERM and Ctrl-C save and exit with
code 0, after the evaluation if one is due; a second one aborts. The workdir (a folder, or gs://…) holds metrics.jsonl, tensorboard/,
checkpoints/, adapter/ and loss.png; after early stopping the adapter is that of the best evaluation.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from absl import flags as absl_flags
from etils import epath
from rich.text import Text

from ftjax import checkpoint, logs, sharding
from ftjax.checkpoint import Checkpoints
from ftjax.cli import adapter, build, measure, runtime, show
from ftjax.cli import config as configs
from ftjax.cli.loop import EARLY, FINISHED, Loop, Memory, run
from ftjax.cli.stop import Stop
from ftjax.train import init_state
from ftjax.types import TrainState


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax train`."""
    configs.define(flags, argv)
    absl_flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, the adapter", flag_values=flags)
    absl_flags.DEFINE_bool("allow_config_change", False, "resume although the config is another than the run began with", flag_values=flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Train."""
    if flags.config is None or not flags.workdir:
        missing = "--workdir=FOLDER" if flags.config is not None else "--config=FILE"
        raise ValueError(f"train: {missing} is needed, as in: ftjax train --config=configs/quickstart.py --workdir=runs/quickstart")
    runtime.start(flags)
    alone = checkpoint.lock(flags.workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone, Stop() as stop:
        train(flags.config, epath.Path(flags.workdir), stop, allow_config_change=flags.allow_config_change)


def train(config, workdir: epath.Path, stop: Stop, *, allow_config_change: bool = False) -> None:
    """Run a config in a workdir, from its last checkpoint if there is one."""
    began, first = time.monotonic(), jax.process_index() == 0
    terminal = logs.Terminal(quiet=not first)
    key = jax.random.key(config.seed)

    # ---- config ----
    config = build.resolved(config)
    config_json = configs.as_json(config)
    build.check_best_metric(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric)
    runtime.agree("workdir: the last checkpoint", (checkpoints.steps() or [0])[-1])  # asked before anything is loaded
    if last := checkpoints.last_record(fall_back=config.checkpoint.fall_back):
        configs.check_unchanged(last.config, config_json, allowed=allow_config_change)

    # ---- mesh ----
    mesh = build.mesh(config)
    terminal.say(show.machine(mesh))

    # ---- model and weights ----
    loaded = build.model(config, mesh)
    terminal.say(show.model(loaded))

    # ---- method ----
    method = build.method(config)
    frozen, trainable = sharding.init_on_mesh(method.init, jax.random.fold_in(key, 0), loaded.params, mesh=mesh)
    plans = method.plan(loaded.params)
    terminal.heading("What is trained")
    terminal.say(logs.plan_table(plans, loaded.params, trainable))
    if mesh.size > 1:
        terminal.heading("Where it lies")
        terminal.say(show.layout({"frozen": frozen, "trained": trainable}, mesh))
    loaded = loaded._replace(params=None)  # what of it is frozen is in `frozen`

    # ---- data ----
    encoder = build.encoder(config, loaded.tokenizer)
    loader, reports = build.loader(config, encoder, mesh)
    held_out = build.loader(config, encoder, mesh, held_out=True)[0] if config.data.eval_sources else None
    terminal.heading("What it learns from")
    terminal.say(show.sources(reports, loader))
    terminal.say(show.preview(loader.sequences, loaded.tokenizer, count=2, console=terminal.console))

    # ---- step ----
    optimizer = build.optimizer(config)
    flops = partial(logs.flops_per_batch, frozen, jax.eval_shape(lambda tree: tree, trainable), loaded.model.config)
    make_state = partial(init_state, optimizer=optimizer)
    state = sharding.init_on_mesh(make_state, jax.random.fold_in(key, 1), trainable, mesh=mesh)
    del trainable  # the state's, and donated with it
    shardings = sharding.state_shardings(state, mesh)
    step = build.train_step(config, loaded.model, method, optimizer, mesh, state)
    evaluate_step = build.eval_step(config, loaded.model, method, mesh)

    # ---- where the run stands ----
    memory, start = Memory(), 0
    if checkpoints.steps():
        state, record = checkpoints.restore(state, fall_back=config.checkpoint.fall_back)
        memory, start = Memory(**record.memory), record.step
        checkpoints.set_aside(after=start)
        terminal.say(f"going on from step {start}, saved in {checkpoints.folder}")

    # ---- loop ----
    terminal.heading("Training")
    quiz = build.quiz(config, loaded, encoder, lambda state: method.attach(frozen, state.trainable))
    with contextlib.ExitStack() as open_until_the_end:
        open_until_the_end.callback(checkpoints.close)
        writers = logs.Writers(_writers(config, config_json, workdir, start) if first else ())
        open_until_the_end.callback(writers.close)

        def evaluate(state: TrainState, done: int) -> dict[str, float]:
            batches = itertools.islice(held_out.epoch(), config.eval.batches or None)
            put = (build.on_mesh(batch, mesh) for batch in batches)
            values = measure.evaluate(partial(evaluate_step, state.trainable, frozen), put)
            _log_samples(writers, quiz, state, done, config.eval.samples)
            return values

        loop = Loop(
            config=config,
            config_json=config_json,
            step=step,
            frozen=frozen,
            batches=loader.iterate,
            put=partial(build.on_mesh, mesh=mesh),
            flops=flops,
            parts=sharding.batch_share(mesh)[1],
            learning_rate=build.learning_rate(config),
            evaluate=evaluate if held_out and config.eval.every_steps else None,
            evaluate_every=loader.steps_per_epoch if config.eval.every_steps < 0 else config.eval.every_steps,
            checkpoints=checkpoints,
            writers=writers,
            terminal=terminal,
            meter=logs.Meter(logs.peak_flops(build.dtype(config.model.dtype)) * jax.process_count()),
            stop=stop,
            memory=memory,
        )
        if not start and not memory.before:
            memory.before = _measured(terminal, quiz, state, "before", config)
        state, done, reason = run(loop, state, start=start)
        if reason not in (FINISHED, EARLY):
            terminal.say(f"{reason}: saved at step {done} of {config.steps}; the same command goes on from there.")
            return
        if reason == EARLY and (best := checkpoints.best()) is not None:
            state = sharding.abstract(state, shardings)  # lets go of the last weights before the best come
            state, _ = checkpoints.restore(state, step=best)
            terminal.say(f"early stopping after step {done}: what follows is of step {best}, the best by {config.checkpoint.best_metric}")
        after = _measured(terminal, quiz, state, "after", config)
        if after:
            writers.write(
                done,
                {f"eval/score_{when}": part.get("score", float("nan")) for when, part in (("before", memory.before), ("after", after))},
            )

    # ---- result ----
    exported = adapter.export(workdir / "adapter", loaded, state.trainable, plans, say=terminal.say, frozen=frozen)
    if first:
        show.ending(terminal, workdir, config, memory.before, after, reason=reason, exported=exported, seconds=time.monotonic() - began)


def _measured(terminal: logs.Terminal, quiz: measure.Quiz, state: TrainState, when: str, config) -> dict[str, Any]:
    """Return the score over the held-out prompts and two of the answers, as plain data; nothing where the config asks for none."""
    count = config.eval.generate.examples
    if not count:
        return {}
    with terminal.console.status(f"answering {count} held-out prompts {when} training"):
        found = quiz(state, count)
    judged = sum(score is not None for score in found.scores)
    terminal.say(
        Text.assemble(f"{config.eval.generate.metric.replace('_', ' ')} {when} training: ", (f"{found.score:.1%}", "bold"), f" of {judged}")
    )
    shown = {"completions": found.completions[:2], "prompts": found.prompts[:2], "wanted": found.wanted[:2]}
    return {"score": found.score, "count": judged, **shown}


def _log_samples(writers: logs.Writers, quiz: measure.Quiz, state: TrainState, done: int, count: int) -> None:
    found = quiz(state, count) if count else measure.Answers([], [], [], [])
    for prompt, completion in zip(found.prompts, found.completions, strict=True):
        writers.text(done, "eval/sample", f"{prompt}\n→ {completion}")


def _writers(config, config_json: Mapping[str, Any], workdir: epath.Path, start: int) -> list[logs.Writer]:
    (workdir / "config.json").write_text(json.dumps(config_json, indent=1))
    writers: list[logs.Writer] = [logs.Jsonl(workdir / "metrics.jsonl", resume_step=start)]
    if config.logging.tensorboard:
        writers.append(logs.TensorBoard(workdir / "tensorboard", resume_step=start))
    if config.logging.wandb:
        writers.append(logs.Wandb(project=config.logging.wandb_project, folder=workdir, config=config_json, name=workdir.name))
    return writers
