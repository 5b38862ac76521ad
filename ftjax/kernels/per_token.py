"""Any function of one token's logits, without ever holding the logits of all: for what `kernels.logps` has no closed gradient of.

Glossary. A *chunk* is a slice of a few tokens from every row, whose logits are all that exists at a time. The *head* turns hidden states
into logits. *Extras* are further arrays `[b, t, ...]` that the function reads at the same token: a teacher's hidden states, stored log-
probabilities.

Memory: one chunk of logits. Work: the logits are computed twice under a gradient, forwards and backwards. Tokens that the mask leaves out
are sorted to the end of each row, and a chunk without a token is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def per_token(
    function: Callable[..., Any],
    unembed: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: Float[Array, "b t d"],
    mask: Float[Array, "b t"],
    *extras: jax.Array,
    chunk: int,
    extra_mask: Float[Array, "b s"] | None = None,
) -> Any:
    """Return `function(logits [b, chunk, v], *extras at the same tokens)` for every token of the mask, 0 elsewhere: `[b, t, ...]`.

    Args:
      function: of each token by itself, to `[b, chunk, ...]` or a tree of such; differentiable in the logits.
      unembed: `(head, hidden [..., d]) -> logits [..., v]`, float32.
      head: its parameters; gradients flow into them.
      hidden: `[b, t, d]`.
      mask: `[b, t]`: the tokens that count.
      *extras: `[b, s, ...]`, without gradients.
      chunk: tokens of each row whose logits exist at a time.
      extra_mask: `[b, s]`, which tokens of the extras count, where they are not those of `mask`: the n-th counted token of a row then meets
        the n-th of its extras, and one that has no partner has the value 0.
    """
    time = hidden.shape[1]
    chunk = max(1, min(chunk, time))
    order, rank = _sorted(mask)
    partners = mask if extra_mask is None else extra_mask
    partner_order, _ = _sorted(partners)
    length = time + -time % chunk
    rows = [_take(x, order, length) for x in (hidden, mask)]
    others = [_take(jax.lax.stop_gradient(x), partner_order, length) for x in (partners, *extras)]

    def body(_, items):
        h, m, p, *e = items
        both = (m > 0) & (p > 0)
        h = jnp.where((m > 0)[..., None], h, jnp.zeros((), h.dtype))
        only = lambda x: jnp.where(both.reshape(*both.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))  # noqa: E731
        compute = lambda: jax.tree.map(only, function(unembed(head, h), *e))  # noqa: E731
        return None, jax.lax.cond(jnp.any(both), compute, lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(compute)))

    chunks = [jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0) for x in (*rows, *others)]
    found = jax.lax.scan(jax.checkpoint(body), None, tuple(chunks))[1]
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(hidden.shape[0], length, *x.shape[3:]), found)
    return jax.tree.map(lambda x: _take(x, rank, time), found)


def _sorted(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the order that brings the counted tokens to the front, and the way back."""
    order = jnp.argsort(mask <= 0, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def _take(x: jax.Array, order: jax.Array, length: int) -> jax.Array:
    """Return `x` in that order, cut or padded with zeros to `length` tokens."""
    index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, axis=1)[:, :length]
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
