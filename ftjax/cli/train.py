"""Fine-tune a model as a config says.

  ftjax train --config=configs/quickstart.py --workdir=runs/quickstart
  ftjax train --config=configs/quickstart.py:smoke --workdir=/tmp/smoke        a few seconds, with a tiny random model
  ftjax train --config=… --workdir=… --config.optimizer.learning_rate=3e-4     any field of the config
  ftjax train --config=… --workdir=… --sweep="seed=0,1 lora.rank=8,16"         four runs side by side, and the best of them

The same command in the same workdir goes on where it stopped, with the same bits as if it never had. SIGTERM and Ctrl-C save and exit with
code 0, after the evaluation if one is due; a second one aborts. The workdir (a folder, or gs://…) holds metrics.jsonl, tensorboard/,
checkpoints/, adapter/ and loss.png; after early stopping the adapter is that of the best evaluation.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from functools import partial
from typing import NamedTuple

import jax
import optax
from absl import flags as absl_flags
from etils import epath
from ml_collections import ConfigDict

from ftjax import checkpoint, logs, peft, quant, sharding
from ftjax.cli import (
    adapter,
    beginning,
    build,
    measure,
    objective,
    online,
    products,
    reference,
    rollouts,
    runtime,
    said,
    show,
    sweep,
    teaching,
)
from ftjax.cli import config as configs
from ftjax.cli.ahead import Past, with_past, without_past
from ftjax.cli.hindsight import Actor
from ftjax.cli.loop import EARLY, FINISHED, Evaluate, Loop, Memory, Stream, take_steps
from ftjax.cli.run import Lessons, Run, ask, begin, open_writers, read
from ftjax.cli.stop import Stop
from ftjax.cli.students import Students
from ftjax.train import init_state
from ftjax.types import Params, Plan, TrainState, Transform

Batches = Stream | Students | online.Experiences
"""From the data, from a student and the data, or from the policy."""


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax train`."""
    configs.define(flags, argv)
    absl_flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, the adapter", flag_values=flags)
    absl_flags.DEFINE_string(
        "sweep", "", "runs to train side by side, as in 'optimizer.learning_rate=1e-4,3e-4 seed=0,1'", flag_values=flags
    )
    absl_flags.DEFINE_bool("allow_config_change", False, "resume although the config is another than the run began with", flag_values=flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Train."""
    if flags.config is None or not flags.workdir:
        missing = "--workdir=FOLDER" if flags.config is not None else "--config=FILE"
        raise ValueError(f"train: {missing} is needed, as in: ftjax train --config=configs/quickstart.py --workdir=runs/quickstart")
    if flags.sweep:
        with flags.config.unlocked() as config:
            config.sweep = flags.sweep
    runtime.start(flags)
    alone = checkpoint.lock(flags.workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone, Stop() as stop:
        whole = sweep.train if flags.config.get("sweep") else train
        whole(flags.config, epath.Path(flags.workdir), stop, allow_config_change=flags.allow_config_change)


class Policy(NamedTuple):
    """The model that is trained: what of it is frozen, and how the rest is."""

    loaded: build.Loaded
    """Without its parameters: what of them is frozen is in `frozen`."""
    method: Transform
    frozen: Params
    plans: tuple[Plan, ...]
    optimizer: optax.GradientTransformation
    teacher: build.Loaded | None


def train(config: ConfigDict, workdir: epath.Path, stop: Stop, *, allow_config_change: bool = False) -> None:
    """Run a config in a workdir, from its last checkpoint if there is one."""
    began = time.monotonic()
    run = begin(config, workdir, stop, allow_config_change=allow_config_change)
    policy, trainable, anchor = _load(run)
    lessons = said.told(run.config, read(run, policy.loaded.tokenizer))
    lessons = teaching.heard(run.config, lessons, policy.teacher)
    if anchor is not None and (lessons := reference.told(run, policy.loaded.model, anchor, lessons)) is None:
        return
    del anchor
    state = _state(run, policy, trainable)
    del trainable  # the state's, and donated with it
    with contextlib.closing(run.checkpoints):
        state, memory, start = _resume(run, state)
        meter = logs.Meter(logs.peak_flops(build.dtype(run.config.model.dtype)) * jax.process_count())
        state, past = without_past(state)
        batch = _batches(run, policy, lessons, past, meter, memory, start)
        with contextlib.closing(open_writers(run, start)) as writers, contextlib.closing(batch):
            run.terminal.heading("Training")
            quiz = build.quiz(
                run.config, policy.loaded, lessons.encoder, lambda state: policy.method.attach(policy.frozen, state.trainable)
            )
            if not start and not memory.before:
                memory.before = ask(run, quiz, state, "before")
            evaluate = _examination(run, policy, lessons, quiz, batch, writers)
            loop = _loop(run, policy, lessons, state, batch, meter, memory, writers, evaluate)
            state, done, reason = take_steps(loop, state, start=start)
            if reason not in (FINISHED, EARLY):
                run.terminal.say(f"{reason}: saved at step {done} of {run.config.steps}; the same command goes on from there.")
                return
            if reason == EARLY and (best := run.checkpoints.best()) is not None:
                state = batch.stored(state)
                # Lets go of the last weights before the best come.
                state = sharding.abstract(state, sharding.state_shardings(state, run.mesh))
                state, _ = run.checkpoints.restore(state, step=best)
                run.terminal.say(
                    f"early stopping after step {done}: what follows is of step {best}, the best by {run.config.checkpoint.best_metric}"
                )
            after = ask(run, quiz, state, "after")
            if after:
                scores = {"before": memory.before, "after": after}
                writers.write(done, {f"eval/score_{when}": part.get("score", float("nan")) for when, part in scores.items()})
    exported = adapter.export(
        run.workdir / "adapter",
        policy.loaded,
        state.trainable,
        policy.plans,
        policy.frozen,
        methods=build.methods(run.config),
        say=run.terminal.say,
    )
    if jax.process_index() == 0:
        seconds = time.monotonic() - began
        show.ending(run.terminal, run.workdir, run.config, memory.before, after, reason=reason, exported=exported, seconds=seconds)


def _load(run: Run) -> tuple[Policy, Params, Params | None]:
    """Return the model with its method, what is trainable before the first step, and the reference if it is asked before that too."""
    config, mesh, terminal = run.config, run.mesh, run.terminal
    loaded = build.model(config, mesh)
    terminal.say(show.model(loaded, group_tokens=config.model.group_tokens))
    method, frozen, trainable = beginning.method(config, loaded, mesh)
    frozen = quant.for_device(frozen, mesh)
    plans = method.plan(loaded.params)
    anchor = peft.reference(frozen, loaded.params) if objective.asks_once(config) else None
    terminal.heading("What is trained")
    terminal.say(logs.plan_table(plans, loaded.params, trainable))
    rows = config.data.batch_size * config.data.max_tokens // config.data.accumulation // sharding.batch_share(mesh)[1]
    if multiplied := products.told(frozen, mesh, rows=rows, dtype=config.model.dtype):
        terminal.say(multiplied)
    if mesh.size > 1:
        terminal.heading("Where it lies")
        terminal.say(show.layout({"frozen": frozen, "trained": trainable}, mesh))
    if teacher := teaching.load(config, mesh, loaded):
        terminal.say(f"taught by {show.model(teacher)}")
    return Policy(loaded._replace(params=None), method, frozen, plans, build.optimizer(config), teacher), trainable, anchor


def _state(run: Run, policy: Policy, trainable: Params) -> TrainState:
    """Return the state before the first step."""
    key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
    carried = objective.carried(run.config, policy.loaded.model, run.mesh, policy.method)
    start = partial(init_state, method=policy.method, optimizer=policy.optimizer, carried=carried)
    return sharding.init_on_mesh(start, key, trainable, mesh=run.mesh)


def _resume(run: Run, state: TrainState) -> tuple[TrainState, Memory, int]:
    """Return what the last checkpoint holds, what the run remembered there and its step; without one that of a run that begins."""
    state = with_past(state, bound=rollouts.staleness(run.config))
    if not run.checkpoints.steps():
        return state, Memory(), 0
    state, record = run.checkpoints.restore(state, fall_back=run.config.checkpoint.fall_back)
    run.checkpoints.set_aside(after=record.step)
    run.terminal.say(f"going on from step {record.step}, saved in {run.checkpoints.folder}")
    return state, Memory(**record.memory), record.step


def _batches(run: Run, policy: Policy, lessons: Lessons, past: Past, meter: logs.Meter, memory: Memory, start: int) -> Batches:
    """Return where the batches come from: from the data, or from the policy itself."""
    actor = Actor(policy.loaded.model, policy.method, policy.frozen)
    if objective.on_policy(run.config):
        return Students(run, actor, lessons, start=start, meter=meter)
    if not rollouts.used(run.config):
        return Stream(lessons.loader.iterate(start))
    return online.Experiences(run, actor, lessons, past, start=start, meter=meter, memory=memory)


def _loop(
    run: Run,
    policy: Policy,
    lessons: Lessons,
    state: TrainState,
    batch: Batches,
    meter: logs.Meter,
    memory: Memory,
    writers: logs.Writers,
    evaluate: Evaluate | None,
) -> Loop:
    config, mesh, loaded = run.config, run.mesh, policy.loaded
    shapes = jax.eval_shape(lambda tree: tree, state.trainable)
    return Loop(
        config=config,
        config_json=run.config_json,
        step=objective.train_step(
            config, loaded.model, policy.method, policy.optimizer, mesh, state, teacher=policy.teacher and policy.teacher.model
        ),
        frozen=teaching.beside(policy.frozen, policy.teacher),
        batch=batch,
        stored=batch.stored,
        stride=rollouts.stride(config),
        put=partial(build.on_mesh, mesh=mesh),
        flops=partial(logs.flops_per_batch, policy.frozen, shapes, loaded.model.config, group_tokens=config.model.group_tokens),
        parts=sharding.batch_share(mesh)[1],
        learning_rate=build.learning_rate(config),
        evaluate=evaluate,
        evaluate_every=rollouts.stride(config) * lessons.loader.steps_per_epoch if config.eval.every_steps < 0 else config.eval.every_steps,
        checkpoints=run.checkpoints,
        writers=writers,
        terminal=run.terminal,
        meter=meter,
        stop=run.stop,
        memory=memory,
    )


def _examination(run: Run, policy: Policy, lessons: Lessons, quiz: measure.Quiz, batch: Batches, writers: logs.Writers) -> Evaluate | None:
    """Return what is done at each evaluation; None where the config asks for none."""
    config, held_out = run.config, lessons.held_out
    if held_out is None or not config.eval.every_steps:
        return None
    if isinstance(batch, online.Experiences):

        def judged(state: TrainState, done: int) -> dict[str, float]:
            values = batch.examine(state)
            _log_samples(writers, quiz, state, done, config.eval.samples)
            return values

        return judged
    teacher, frozen = policy.teacher and policy.teacher.model, teaching.beside(policy.frozen, policy.teacher)
    step = objective.eval_step(config, policy.loaded.model, policy.method, run.mesh, teacher=teacher)

    def evaluate(state: TrainState, done: int) -> dict[str, float]:
        batches = itertools.islice(held_out.epoch(), config.eval.batches or None)
        put = (build.on_mesh(batch, run.mesh) for batch in batches)
        values = measure.evaluate(partial(step, state.trainable, frozen, remembered=state.carried), put)
        _log_samples(writers, quiz, state, done, config.eval.samples)
        return values

    return evaluate


def _log_samples(writers: logs.Writers, quiz: measure.Quiz, state: TrainState, done: int, count: int) -> None:
    found = quiz(state, count) if count else measure.Answers([], [], [], [])
    for prompt, completion in zip(found.prompts, found.completions, strict=True):
        writers.text(done, "eval/sample", f"{prompt}\n→ {completion}")
