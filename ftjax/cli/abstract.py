"""The training step of a config on a mesh, with shapes in place of arrays: what the command line builds, and nothing is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import data, online, peft, sharding, tree
from ftjax.cli import build, objective, rollouts, said, teaching
from ftjax.peft import inits
from ftjax.train import Step, init_state
from ftjax.types import Batch, Model, Params, TrainState, Transform


class Built(NamedTuple):
    """The steps, and the shapes that they take, each with its sharding."""

    train_step: Step
    eval_step: Step
    state: TrainState
    frozen: Params
    batch: Batch
    model: Model
    method: Transform
    params: Params
    """Of the model alone, before any method."""
    teacher: Model | None


def built(config, mesh: Mesh) -> Built:
    """Return the steps of a config, built by the functions that `ftjax train` calls."""
    model, _ = build.architecture(config)
    key = jax.random.key(0)
    params = build.shapes(config, model)
    found = statistics(config, params)
    method, optimizer = build.method(config, found), build.optimizer(config)
    frozen, trainable = jax.eval_shape(lambda key, params, found: build.method(config, found).init(key, params), key, params, found)
    carried = objective.carried(config, model, mesh, method)
    state = jax.eval_shape(partial(init_state, method=method, optimizer=optimizer, carried=carried), key, trainable)
    teacher = teaching.architecture(config)
    return Built(
        objective.train_step(config, model, method, optimizer, mesh, state, teacher=teacher),
        objective.eval_step(config, model, method, mesh, teacher=teacher),
        sharding.abstract(state, sharding.state_shardings(state, mesh)),
        sharding.abstract(frozen, sharding.shardings(frozen, mesh)) | teaching.abstract(config, teacher, mesh),
        batch(mesh, config),
        model,
        method,
        params,
        teacher,
    )


def batch(mesh: Mesh, config, *, rows: int | None = None) -> Batch:
    """Return the shapes of a batch of a config on a mesh, of other than its own rows if they are given; packed items each fill a row."""
    needs, rows, tokens = objective.needs(config), rows or config.data.batch_size, config.data.max_tokens
    responses, packed = data.KINDS.get(needs.data, 1), objective.packs(config)
    places, items = (rows, 1, responses, tokens), (rows,)
    if packed and needs.data == data.ROLLOUTS:  # a row has all samples of a prompt
        group, longest = config.rollout.samples_per_prompt, config.rollout.max_tokens + 1
        rows, tokens = -(-rows // group), online.rounded(tokens + (group - 1) * longest)
        places, items = (rows, group, 1, longest), (rows, group)

    def of(dtype: Any, *shape: int, time: bool = True) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh, ndim=len(shape), time=time))

    shape = (rows, responses * tokens) if packed else (rows, responses, tokens) if responses > 1 else (rows, tokens)
    ids, mask = of(jnp.int32, *shape), of(jnp.float32, *shape)
    said_once, labels = (mask if wanted else None for wanted in (objective.asks_once(config), needs.data == data.STEPS))
    found = Batch(ids, mask, ids, ids, reference_logps=said_once, labels=labels)
    if objective.taught(config) and config.teacher.file:
        ids_of, logps_of = (of(dtype, *shape, said.count(config.teacher.file), time=False) for dtype in (jnp.int32, jnp.float32))
        found = dataclasses.replace(found, teacher_ids=ids_of, teacher_logps=logps_of)
    if packed:
        found = dataclasses.replace(found, places=of(jnp.int32, *places, time=False))
    if needs.data == data.ROLLOUTS:
        old, reference = (mask if wanted else None for wanted in (rollouts.stride(config) > 1, rollouts.referred(config)))
        worth = dict.fromkeys(needs.fields, mask) | (
            {} if "returns" in needs.fields else {"advantages": of(jnp.float32, *items, time=False)}
        )
        values = mask if rollouts.estimator(config).values else None
        told = {"behavior_logps": mask, "old_logps": old, "old_values": values, "reference_logps": reference}
        return dataclasses.replace(found, **told, **worth)
    if needs.data == data.LABELLED or "desirable" in needs.fields:
        found = dataclasses.replace(found, desirable=of(jnp.float32, *((rows, 1) if packed else (rows,)), time=False))
    return dataclasses.replace(found, mismatched=Batch(ids, mask, ids, ids)) if needs.baseline else found


def statistics(config, params: Params) -> dict[str, Mapping[str, jax.ShapeDtypeStruct]]:
    """Return the shapes of `ftjax.cli.beginning.statistics`."""
    flat, found = tree.flatten(params), {}
    for name, options in build.methods(config):
        init = options.get("init")
        if init in inits.CALIBRATED:
            paths = {path for row in peft.METHODS[name](**options).plan(params) for path in row.paths}
            shapes = {path: (*flat[path].shape[:-1], flat[path].shape[-1 if init == "lora_ga" else -2]) for path in sorted(paths)}
            found[name] = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return found
