"""The training step of a config on a mesh, with shapes in place of arrays: what the command line builds, and nothing is computed."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.cli import build
from ftjax.train import Step, init_state
from ftjax.types import Batch, Params, TrainState


class Built(NamedTuple):
    """The steps, and the shapes that they take, each with its sharding."""

    train_step: Step
    eval_step: Step
    state: TrainState
    frozen: Params
    batch: Batch


def built(config, mesh: Mesh) -> Built:
    """Return the steps of a config, built by the functions that `ftjax train` calls."""
    model, _ = build.architecture(config)
    method, optimizer = build.method(config), build.optimizer(config)
    key = jax.random.key(0)
    frozen, trainable = jax.eval_shape(lambda key: method.init(key, model.init(key)), key)
    state = jax.eval_shape(partial(init_state, method=method, optimizer=optimizer), key, trainable)
    ids, mask = (
        jax.ShapeDtypeStruct((config.data.batch_size, config.data.max_tokens), dtype, sharding=sharding.batch_sharding(mesh))
        for dtype in (jnp.int32, jnp.float32)
    )
    return Built(
        build.train_step(config, model, method, optimizer, mesh, state),
        build.eval_step(config, model, method, mesh),
        sharding.abstract(state, sharding.state_shardings(state, mesh)),
        sharding.abstract(frozen, sharding.shardings(frozen, mesh)),
        Batch(ids, mask, ids, ids),
    )
