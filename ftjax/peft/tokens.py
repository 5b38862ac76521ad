"""Trainable tokens: a few rows of the embedding, for tokens that are new or mean something new."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree, weights
from ftjax.peft.riding import by_leaf, check_matrix
from ftjax.types import Params, Plan, Transform, pytree, static
from ftjax.weights import Leaf, Wrapper


@pytree
class TokensWeight(Wrapper):
    """`materialize() == base` but at the rows `ids`, which are `rows`."""

    base: Leaf
    """`[v, d]`."""
    rows: jax.Array
    """float32 `[n, d]`."""
    ids: tuple[int, ...] = static()
    """Ascending."""

    def materialize(self) -> jax.Array:
        dense = weights.materialize(self.base)
        return dense.at[np.array(self.ids)].set(self.rows.astype(dense.dtype))

    def neutral(self) -> TokensWeight:
        return dataclasses.replace(self, rows=weights.embed(jnp.array(self.ids), self.base).astype(jnp.float32))

    def embed(self, ids: jax.Array) -> jax.Array:
        base = weights.embed(ids, self.base)
        order = jnp.minimum(jnp.searchsorted(jnp.array(self.ids, ids.dtype), ids), len(self.ids) - 1)
        found = jnp.array(self.ids, ids.dtype)[order] == ids
        return jnp.where(found[..., None], self.rows[order].astype(base.dtype), base)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        logits = weights.dot_transposed(x, self.base)
        return logits.at[..., np.array(self.ids)].set(weights.dot_transposed(x, self.rows.astype(self.dtype)))


def tokens(ids: Sequence[int] = (), *, targets: tree.Filter = "embed_tokens/kernel", name: str = "tokens") -> Transform:
    """Train some rows of the embedding; the others, and what they mean, stay exactly as they are.

    x_t = rows[k] where token t is ids[k], else E[token t]

    The rows start as copies in float32 and replace those of the base, as PEFT's `trainable_token_indices` does. A tied output head sees
    them too; one of its own is left as it is. It costs n d numbers of state, where `full` on the embedding costs v d.

    Args:
      ids: the tokens, at least one and each once.
      targets: the embedding, `[v, d]`.
      name: the key in the trainable tree.

    Raises:
      ValueError: nothing matched, or something that is no embedding; an id appears twice or is not in the vocabulary.

    Example:
      >>> params = {"embed_tokens": {"kernel": jnp.ones((11, 4), jnp.bfloat16)}}
      >>> frozen, trainable = tokens([10, 3]).init(jax.random.key(0), params)
      >>> trainable["tokens"]["embed_tokens"]["kernel"]["rows"].shape
      (2, 4)
    """
    chosen = tuple(sorted(int(id) for id in ids))
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"{name}: expected at least one id and each once, not {list(ids)}.")

    def paths(params: Params) -> tuple[str, ...]:
        return tree.matches(params, targets, who=name)

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        del key
        flat, trained = tree.flatten(params), {}
        for path in paths(params):
            shape = check_matrix(name, path, flat[path].shape)
            if len(shape) > 2:
                raise ValueError(f"{name}: {path!r} with shape {list(shape)} is a stack of layers, not an embedding [v, d].")
            if not 0 <= chosen[0] <= chosen[-1] < shape[0]:
                raise ValueError(f"{name}: ids from {chosen[0]} to {chosen[-1]} do not fit {path!r}: expected 0 to {shape[0] - 1}.")
            trained[f"{path}/rows"] = weights.embed(jnp.array(chosen), flat[path]).astype(jnp.float32)
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        flat = tree.flatten(frozen)
        found = by_leaf(tree.flatten(trainable[name]))
        return tree.replace(frozen, {path: TokensWeight(flat[path], fields["rows"], chosen) for path, fields in found.items()})

    def plan(params: Params) -> tuple[Plan, ...]:
        return (Plan(name, tree.describe(targets), paths(params), {"ids": chosen}),)

    return Transform(init, attach, plan)
