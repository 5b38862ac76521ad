"""The geometric mixture of a policy and its reference as one model, so that whatever samples from a model samples from both.

The parameters are the policy's with those of the reference in a branch beside them. Both read the same tokens: the mixture's hidden states
are theirs side by side, its cache holds the reference's layers behind the policy's, and its logits are a weighted sum of theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models.cache import Cache
from ftjax.types import Model, Params

REFERENCE = "mixed_with"
"""The branch of the reference's parameters."""


def geometric(model: Model, *, share: float) -> Model:
    """Return π^(1-m) π_ref^m, normalised at each token, as a model of the parameters of `both`.

    log π_m(v) = (1 - m) log π(v) + m log π_ref(v) - log Z, where Z is that of the token: Munos et al., 2023, arXiv 2312.00886, section 4.1,
    mixes whole responses and section 7 tokens, as is done here. The constants of the two soft-maxes are part of log Z, so that logits may
    be mixed instead. A temperature divides what is mixed.

    Args:
      model: the architecture of both; on a mesh the one from `sharding.on_mesh`.
      share: m in [0, 1], of the reference.

    Raises:
      ValueError: the share is out of its range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"geometric: the share of the reference is in [0, 1], not {share}.")
    layers = model.config.num_hidden_layers

    def apply(params: Params, tokens: jax.Array, *, cache: Cache | None = None, **options: Any) -> tuple[jax.Array, Cache | None]:
        parts = (None, None) if cache is None else _halves(cache, layers)
        found = [model.apply(one, tokens, cache=part, **options) for one, part in zip(_split(params), parts, strict=True)]
        hidden = jnp.concatenate([hidden for hidden, _ in found], axis=-1)
        return hidden, None if cache is None else _joined(*(part for _, part in found))

    def head(params: Params) -> Params:
        return dict(zip(("policy", "reference"), map(model.head, _split(params)), strict=True))

    def unembed(head: Params, hidden: jax.Array) -> jax.Array:
        ours, theirs = jnp.split(hidden, 2, axis=-1)
        return (1 - share) * model.unembed(head["policy"], ours) + share * model.unembed(head["reference"], theirs)

    config = dataclasses.replace(model.config, num_hidden_layers=2 * layers)  # the cache has as many
    return Model(config, model.init, apply, head, unembed)


def both(policy: Params, reference: Params) -> Params:
    """Return the parameters of a mixture; neither has virtual tokens (`models.virtual`), which the two would have to share."""
    return {**policy, REFERENCE: reference}


def _split(params: Params) -> tuple[Params, Params]:
    return {name: branch for name, branch in params.items() if name != REFERENCE}, params[REFERENCE]


def _halves(cache: Cache, layers: int) -> tuple[Cache, Cache]:
    """Return the caches of the policy and of the reference."""
    ours, theirs = (slice(layers), slice(layers, None))
    return tuple(dataclasses.replace(cache, k=cache.k[part], v=cache.v[part]) for part in (ours, theirs))


def _joined(policy: Cache, reference: Cache) -> Cache:
    k, v = (jnp.concatenate(pair) for pair in ((policy.k, reference.k), (policy.v, reference.v)))
    return dataclasses.replace(policy, k=k, v=v)
