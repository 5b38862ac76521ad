"""NEFTune: uniform noise on the embeddings in training, and in training only."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.types import Params, Plan, Transform, pytree, static
from ftjax.weights import Leaf, Wrapper, dot, dot_transposed, embed, materialize


@pytree
class NoisyEmbedding(Wrapper):
    """`embed(ids) = base[ids] + U(-1, 1) * alpha / sqrt(t * d)`; every other use is the base's."""

    base: Leaf
    key: jax.Array
    alpha: float = static()

    def materialize(self) -> jax.Array:
        return materialize(self.base)

    def dot(self, x: jax.Array) -> jax.Array:
        return dot(x, self.base)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return dot_transposed(x, self.base)

    def embed(self, ids: jax.Array) -> jax.Array:
        rows = embed(ids, self.base)
        magnitude = self.alpha / math.sqrt(ids.shape[-1] * rows.shape[-1])
        noise = jax.random.uniform(self.key, rows.shape, jnp.float32, -magnitude, magnitude)
        return (rows.astype(jnp.float32) + noise).astype(rows.dtype)


def neftune(alpha: float = 5.0, *, targets: tree.Filter = "embed_tokens/kernel", name: str = "neftune") -> Transform:
    """Add noise to the token embeddings of every training batch.

    x' = x + alpha / sqrt(t d) · U(-1, 1)        (Jain et al., 2023, arXiv 2310.05914, algorithm 1)

    `t` is the padded length of a row; the paper counts its real tokens. A tied output head sees no noise.

    Args:
      alpha: the noise's size; the paper uses 5, 10 or 15.
      targets: the embedding.
      name: the method's name in the printed plan; it trains nothing.
    """

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        del key
        tree.matches(params, targets, who=name)
        return params, {}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del trainable
        if key is None:
            return frozen
        flat = tree.flatten(frozen)
        paths = tree.matches(frozen, targets, who=name)
        return tree.replace(frozen, {path: NoisyEmbedding(flat[path], jax.random.fold_in(key, n), alpha) for n, path in enumerate(paths)})

    def plan(params: Params) -> tuple[Plan, ...]:
        return (Plan(name, tree.describe(targets), tree.matches(params, targets, who=name), {"alpha": alpha}),)

    return Transform(init, attach, plan)
