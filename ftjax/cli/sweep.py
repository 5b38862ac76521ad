"""A sweep: runs that differ in a few numbers, trained side by side over one model, and the best of them kept.

`ftjax train --sweep="optimizer.learning_rate=1e-4,3e-4 seed=0,1" …` comes here; `ftjax.cli.members` says what can be swept and how it is
written. The members share the model, the batches and their order (that of `config.seed`: a member's seed is that of its start and of its
dropout), the evaluations and the process. At each evaluation every one is judged for itself: its best weights are kept, and after
`early_stopping.patience` evaluations without a better one it stays as it is. `adapter/` then holds the best weights of the best member,
with its own rank and alpha, and `sweep.json` what became of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ftjax import logs, quant, sharding, sweep, tree
from ftjax.checkpoint import Checkpoints
from ftjax.cli import adapter, beginning, build, measure, objective, show, standing
from ftjax.cli import members as sweep_members
from ftjax.cli.loop import EARLY, FINISHED
from ftjax.cli.members import Member
from ftjax.cli.run import Lessons, Run, ask, begin, open_writers, read
from ftjax.cli.standing import Standing
from ftjax.cli.stop import Stop
from ftjax.cli.sweep_loop import Loop, Memory, as_train_state, from_train_state, take_steps
from ftjax.logs.writers import read_jsonl
from ftjax.sweep import Frozen, Numbers, SweepState
from ftjax.types import Params, Plan, Transform


class Own(NamedTuple):
    """A member as it would be alone."""

    method: Transform
    plans: tuple[Plan, ...]
    frozen: Params
    """The shapes of what its method keeps in the frozen tree for itself."""
    trainable: Params
    """The shapes of its trainable tree."""


class Cast(NamedTuple):
    """The members and what they train."""

    members: Sequence[Member]
    loaded: build.Loaded
    """Without its parameters: they are in `frozen`."""
    owns: Sequence[Own]
    frozen: Frozen
    method: Callable[[Numbers], Transform]
    """Of any member, from its numbers."""

    def trained(self, state: SweepState, index: int) -> tuple[Params, Params]:
        """Return the frozen tree of a member and its best weights, in the shapes that they would have alone."""
        own = self.owns[index]
        frozen = {**self.frozen.model, **sweep.member(self.frozen.own, index, own.frozen)}
        return frozen, sweep.member(state.best, index, own.trainable)


def train(config: ConfigDict, workdir: epath.Path, stop: Stop, *, allow_config_change: bool = False) -> None:
    """Run the sweep of a config in a workdir, from its last checkpoint if there is one."""
    began = time.monotonic()
    members = sweep_members.read(config)
    if not config.data.eval_sources or not config.eval.every_steps:
        raise ValueError("sweep: the members are compared on held-out data: set data.eval_sources and eval.every_steps.")
    run = begin(config, workdir, stop, allow_config_change=allow_config_change)
    cast, trainable = _load(run, members)
    lessons = read(run, cast.loaded.tokenizer)
    state = _state(run, cast, trainable)
    del trainable  # the state's, and donated with it
    with contextlib.closing(run.checkpoints):
        state, memory, start = _resume(run, state, Memory([Standing() for _ in members]))
        with contextlib.closing(open_writers(run, start)) as writers:
            run.terminal.heading("Training")
            quiz = build.quiz(run.config, cast.loaded, lessons.encoder, partial(_attached, cast, index=0))
            if not start and not memory.before:
                memory.before = ask(run, quiz, state, "before")
            state, done, reason = take_steps(_loop(run, cast, lessons, state, memory, writers), state, start=start)
            if reason not in (FINISHED, EARLY):
                run.terminal.say(f"{reason}: saved at step {done} of {run.config.steps}; the same command goes on from there.")
                return
            index = _best(run, memory.standings)
            after = ask(run, dataclasses.replace(quiz, attach=partial(_attached, cast, index=index)), state, "after")
    _end(run, cast, state, memory, index, after, reason=reason, began=began)


def best(config: ConfigDict, workdir: epath.Path) -> tuple[build.Loaded, Params]:
    """Return the model of a sweep with the best weights of its best member, as its last checkpoint has them, on one device."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    run = Run(config, {}, workdir, checkpoints, mesh, logs.Terminal(quiet=True), Stop())
    cast, trainable = _load(run, sweep_members.read(config))
    with contextlib.closing(checkpoints):
        like = as_train_state(_state(run, cast, trainable))
        stored, record = checkpoints.restore(like, fall_back=config.checkpoint.fall_back)
    standings = Memory.of(record.memory).standings
    index = _best(run, standings)
    print(f"member {index} ({cast.members[index].label}) at step {standings[index].best_step} of {workdir}")
    return cast.loaded, _attached(cast, from_train_state(stored), index=index)


def _load(run: Run, members: Sequence[Member]) -> tuple[Cast, Params]:
    """Return the model with the members' methods, and what is trainable before the first step, stacked."""
    config, mesh, terminal = run.config, run.mesh, run.terminal
    if objective.taught(config):
        raise ValueError(f"sweep: members of {config.algorithm!r} are not trained side by side yet; train them one after the other.")
    loaded = build.model(config, mesh)
    terminal.say(show.model(loaded, group_tokens=config.model.group_tokens))
    keys = jnp.stack([jax.random.fold_in(jax.random.key(member.config.seed), 0) for member in members])
    found = beginning.statistics(config, loaded, mesh)
    owns = [_own(member.config, loaded.params, found) for member in members]
    model = sharding.init_on_mesh(partial(_shared, members[0].config), keys[0], loaded.params, found, mesh=mesh)
    quant.check_finite("model", tree.flatten(model))

    def start(keys: jax.Array, params: Params, found: Params) -> tuple[Params, Params]:
        arguments = [repr(build.methods(member.config)) for member in members]
        methods = {argument: build.method(member.config, found) for argument, member in zip(arguments, members, strict=True)}
        return sweep.init([methods[argument] for argument in arguments], keys, params)

    where = _stacked_shardings(jax.eval_shape(start, keys, loaded.params, found), mesh)
    own, trainable = jax.jit(start, out_shardings=where)(keys, loaded.params, found)
    numbers = jax.device_put(sweep_members.numbers(members), _everywhere(mesh))
    largest = max(owns, key=_size)
    terminal.heading(f"What is trained, of each of {len(members)} members" + (" at most" if len(set(map(_size, owns))) > 1 else ""))
    terminal.say(logs.plan_table(largest.plans, loaded.params, largest.trainable))
    method = partial(_method, config, _shapes(found))
    return Cast(members, loaded._replace(params=None), owns, Frozen(model, own, numbers), method), trainable


def _own(config: ConfigDict, params: Params, found: Params) -> Own:
    method = build.method(config, _shapes(found))
    frozen, trainable = jax.eval_shape(lambda params, found: build.method(config, found).init(jax.random.key(0), params), params, found)
    return Own(method, method.plan(params), {name: branch for name, branch in frozen.items() if name not in params}, trainable)


def _size(own: Own) -> int:
    return tree.size(own.trainable)


def _shared(config: ConfigDict, key: jax.Array, params: Params, found: Params) -> Params:
    """Return what a method leaves of the model, without what it keeps for itself."""
    frozen, _ = build.method(config, found).init(key, params)
    return {name: branch for name, branch in frozen.items() if name in params}


def _shapes(arrays: Any) -> Any:
    return jax.eval_shape(lambda arrays: arrays, arrays)


def _state(run: Run, cast: Cast, trainable: Params) -> SweepState:
    """Return the state before the first step."""
    keys = jnp.stack([jax.random.fold_in(jax.random.key(member.config.seed), 1) for member in cast.members])
    function = partial(sweep.init_state, method=cast.method, optimizer=partial(_optimizer, run.config))
    where = _state_shardings(jax.eval_shape(function, keys, cast.frozen, trainable), run.mesh)
    return jax.jit(function, out_shardings=where, donate_argnums=2)(keys, cast.frozen, trainable)


def _method(config: ConfigDict, found: Params, numbers: Numbers) -> Transform:
    return build.method(sweep_members.traced(config, numbers), found)


def _optimizer(config: ConfigDict, numbers: Numbers) -> Any:
    return build.optimizer(sweep_members.traced(config, numbers))


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _stacked_shardings(shapes: Any, mesh: Mesh, of_one=sharding.shardings) -> Any:
    """Return the shardings of arrays `[n, ...]`: each member's as they would be alone."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return jax.tree.map(lambda where: NamedSharding(mesh, P(None, *where.spec)), of_one(one, mesh))


def _state_shardings(state: SweepState, mesh: Mesh) -> SweepState:
    members = _stacked_shardings(state.members, mesh, sharding.state_shardings)
    return SweepState(members, _everywhere(mesh), members.trainable)


def _resume(run: Run, state: SweepState, memory: Memory) -> tuple[SweepState, Memory, int]:
    """Return the state of the last checkpoint, what the sweep remembered there and its step; what was given where there is none."""
    if not run.checkpoints.steps():
        return state, memory, 0
    stored, record = run.checkpoints.restore(as_train_state(state), fall_back=run.config.checkpoint.fall_back)
    run.checkpoints.set_aside(after=record.step)
    run.terminal.say(f"going on from step {record.step}, saved in {run.checkpoints.folder}")
    return from_train_state(stored), Memory.of(record.memory), record.step


def _loop(run: Run, cast: Cast, lessons: Lessons, state: SweepState, memory: Memory, writers: logs.Writers) -> Loop:
    config, mesh, model = run.config, run.mesh, cast.loaded.model
    where, everywhere, loss = _state_shardings(state, mesh), _everywhere(mesh), objective.loss_of_batch(config)
    known = objective.comparison(config, model, mesh)
    step = sweep.make_sweep_step(
        objective.score(config, objective.in_training(config, model), mesh),
        cast.method,
        loss,
        partial(_optimizer, config),
        accumulation=config.data.accumulation,
        out_shardings=(where, everywhere),
        **known,
    )
    examine = sweep.make_sweep_eval_step(objective.score(config, model, mesh), cast.method, loss, **known)
    remember = jax.jit(sweep.remember, donate_argnums=0, out_shardings=where)

    def evaluate(state: SweepState) -> list[dict[str, float]]:
        batches = itertools.islice(lessons.held_out.epoch(), config.eval.batches or None)
        put = (build.on_mesh(batch, mesh) for batch in batches)
        return measure.evaluate_each(partial(examine, state.members.trainable, cast.frozen), put, count=len(cast.members))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.members.trainable)
    return Loop(
        config=config,
        config_json=run.config_json,
        members=cast.members,
        step=step,
        frozen=cast.frozen,
        batches=lessons.loader.iterate,
        put=partial(build.on_mesh, mesh=mesh),
        flops=partial(logs.flops_per_batch, cast.frozen.model, shapes, model.config, group_tokens=config.model.group_tokens),
        parts=sharding.batch_share(mesh)[1],
        learning_rates=[build.learning_rate(member.config) for member in cast.members],
        evaluate=evaluate,
        evaluate_every=lessons.loader.steps_per_epoch if config.eval.every_steps < 0 else config.eval.every_steps,
        remember=lambda state, better, active: remember(state, *jax.device_put((better, active), everywhere)),
        checkpoints=run.checkpoints,
        writers=writers,
        terminal=run.terminal,
        meter=logs.Meter(logs.peak_flops(build.dtype(config.model.dtype)) * jax.process_count()),
        stop=run.stop,
        memory=memory,
    )


def _attached(cast: Cast, state: SweepState, *, index: int) -> Params:
    frozen, trainable = cast.trained(state, index)
    return cast.owns[index].method.attach(frozen, trainable)


def _best(run: Run, standings: Sequence[Standing]) -> int:
    metric = run.config.checkpoint.best_metric
    index = standing.leader(standings, metric)
    if index is None:
        raise ValueError(f"sweep: the held-out {metric} of no member was ever finite, so none is the best; try lower learning rates.")
    return index


def _end(run: Run, cast: Cast, state: SweepState, memory: Memory, index: int, after: dict, *, reason: str, began: float) -> None:
    """Write what came of all and the adapter of the best, and say so."""
    frozen, trainable = cast.trained(state, index)
    own, member, metric = cast.owns[index], cast.members[index], run.config.checkpoint.best_metric
    exported = adapter.export(
        run.workdir / "adapter", cast.loaded, trainable, own.plans, frozen, methods=build.methods(member.config), say=run.terminal.say
    )
    if jax.process_index() != 0:
        return
    result = standing.as_json(cast.members, memory.standings, metric, reason=reason)
    (run.workdir / "sweep.json").write_text(json.dumps(result, indent=1))
    logs.sweep_curves(
        read_jsonl(run.workdir / "metrics.jsonl"),
        run.workdir / "loss.png",
        labels=[f"{n}  {one.label}" for n, one in enumerate(cast.members)],
        best=index,
        title=f"{show.model_title(run.config)}, {' + '.join(run.config.methods)}",
        subtitle=f"best: member {index}, {member.label}",
        unit=show.unit(run.config),
    )
    run.terminal.heading("Members")
    run.terminal.say(standing.table(cast.members, memory.standings, metric))
    found = memory.standings[index]
    run.terminal.say(f"what follows is of member {index} ({member.label}) at step {found.best_step}, its best by {metric}")
    seconds = time.monotonic() - began
    show.ending(run.terminal, run.workdir, member.config, memory.before, after, reason=reason, exported=exported, seconds=seconds)
