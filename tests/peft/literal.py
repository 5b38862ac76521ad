"""What LoRA's relatives compute, written out: LoRA over a matrix that moves, a step of Adam at a time."""

from functools import partial

import jax
import jax.numpy as jnp

from ftjax import losses, scoring, tree
from tests import toy

SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=4)


def gradient_of(lora, batch):
    """Return `(trained, params) -> (loss, gradient)`."""

    @jax.jit
    def gradient(trained, params):
        def loss(trained):
            mean, _ = losses.sft(SCORE(lora.attach(params, trained), batch), batch)
            return mean.total / mean.weight

        return jax.value_and_grad(loss)(trained)

    return gradient


def updated(rule, gradient, state):
    """Return the update and the new state of an optax rule, which raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        return rule.update(gradient, state)


def paths(trained):
    """Return the matrices that are ridden on."""
    return sorted({path.rsplit("/", 1)[0] for path in tree.flatten(trained["lora"])})


def product(trained, path):
    """Return A B of a matrix."""
    flat = tree.flatten(trained["lora"])
    return jnp.matmul(flat[f"{path}/a"], flat[f"{path}/b"])
