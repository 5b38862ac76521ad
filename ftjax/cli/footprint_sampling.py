"""How many bytes of a device a run takes beside what it holds while it writes its own samples, from shapes alone.

The keys and values of the slots are those of a ring at its largest, those of the prompts that are read of rows at their widest, where
what all begin with is short. What a step of writing works with is `LOGITS` arrays of logits, as XLA was found to take; or on a CPU a
layer's weights, keys and values, if that is more, which it copies where layers are stacked. Where they lie apart (`models.apart`) it has
matrices in half precision twice, from JAX 0.12 on.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import models, rollout, sharding, tree
from ftjax.cli import abstract, objective, rollouts
from ftjax.models import virtual
from ftjax.rollout import slots as programs
from ftjax.types import Model

LOGITS = 3
"""Arrays `[slots, vocabulary]` of float32 that a step holds at once: logits, what is drawn from, and what the choice makes of them; one
more where they come from a head in half precision."""


class Sampling(NamedTuple):
    """Bytes of the fullest device."""

    cache: int
    """Keys and values of all slots."""
    writing: int
    """Those of the prompts that are read, logits, and matrices laid turned."""


def of(config, mesh: Mesh, kind: str, built: abstract.Built, *, widened: bool) -> Sampling:
    """Return what sampling takes; 0 of a run that samples nothing.

    Args:
      config: of the run.
      mesh: of real or described devices.
      kind: "cpu", "gpu" or "tpu".
      built: of this config and mesh.
      widened: whether the compiler makes copies in float32 of weights that lie in bfloat16, as XLA's CPU does before JAX 0.12.
    """
    if not (rollouts.used(config) or objective.on_policy(config)):
        return Sampling(0, 0)
    params = jax.eval_shape(built.method.attach, built.frozen, built.state.trainable)
    parts, before, rows = sharding.row_parts(mesh), sum(virtual.count(params)), slots(config)
    columns = max(rollout.Engine.read_tokens, rollout.bucket(config.data.max_tokens))
    mixed = objective.needs(config).opponent == "mixture"  # whose cache has the layers of both
    apart = kind == "cpu" and mesh.size == 1 and not mixed and models.separable(built.model, params)
    cache = _cache(built.model, mesh, rows, before + config.data.max_tokens)
    read = _cache(built.model, mesh, parts, before + columns)
    logits = (LOGITS + (jnp.dtype(built.model.config.dtype).itemsize == 2)) * 4 * rows * built.model.config.vocab_size
    layers, head = params["layers"], built.model.head(params)
    one = (cache + tree.num_bytes(layers)) // built.model.config.num_hidden_layers if kind == "cpu" and not apart else 0
    copied = (models.turned_bytes(params) if apart else 0) + (2 * _bfloat16([head] if apart else [head, layers]) if widened else 0)
    return Sampling(cache * (2 if mixed else 1), read + max(logits, one) + copied)


def slots(config) -> int:
    """Return the sequences that are written at a time."""
    return (config.rollout.slots or rollouts.samples(config)) if rollouts.used(config) else config.data.batch_size


def _bfloat16(params: Any) -> int:
    return tree.num_bytes([x for x in jax.tree.leaves(params) if x.dtype == jnp.bfloat16])


def _cache(model: Model, mesh: Mesh, rows: int, columns: int) -> int:
    """Return the bytes of a cache on each device."""
    cache = jax.eval_shape(partial(models.init_cache, model.config, rows, columns, model.config.dtype))
    shape = programs.cache_sharding(cache.k.shape, mesh).shard_shape(cache.k.shape)
    return 2 * math.prod(shape) * cache.k.dtype.itemsize
