"""Causal attention over packed rows: one equation, several implementations that must equal it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from ftjax import tree
from ftjax.kernels.attention import blocked, reference

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.attention,
    "blocked": blocked.attention,
    "blocked_map": functools.partial(blocked.attention, each="map"),
    "blocked_vmap": functools.partial(blocked.attention, each="vmap"),
}
"""`"blocked"` visits heads one after another on a CPU and all at once elsewhere; the two forms can also be named."""


def supports(implementation: str, *, q: jax.Array, k: jax.Array) -> str | None:
    """Return why `implementation` cannot take these arrays (or shapes), or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"there is no attention {implementation!r}; nearest: {tree.nearest(implementation, IMPLEMENTATIONS)}"
    if q.shape[2] % k.shape[2]:
        return f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly"
    return None


def chosen(implementation: str, *, q: jax.Array, k: jax.Array) -> str:
    """Return the name of the implementation that `attention` runs for these arrays (or shapes).

    `"auto"` is `"blocked"`, except for a single query (a step of decoding), which has no diagonal and fits the plain equation.

    Raises:
      ValueError: `implementation` was named and cannot run; nothing else is run in its place.
    """
    name = implementation if implementation != "auto" else ("reference" if q.shape[1] == 1 else "blocked")
    reason = supports(name, q=q, k=k)
    if reason is not None:
        raise ValueError(f"attention: {reason}.")
    return name


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    scale: float,
    window: jax.Array | int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Return causal attention, `softmax(cap(q kᵀ · scale)) v` over the visible keys, with the softmax in float32.

    A query sees a key of its own segment whose position is not later than its own and, with a window, less than `window` before it.
    Segment 0 is padding: it sees only padding, so its outputs are finite and mean nothing.

    Where `t == s` the keys must be those of the same rows in the same order and positions must rise by at least one along a segment, so
    that a key later in the row is never visible: blocks of queries then stop at the diagonal.

    Args:
      q: `[b, t, h, c]`.
      k: `[b, s, k, c]`; `h` is a multiple of `k` (grouped queries, Ainslie et al. 2023, arXiv:2305.13245).
      v: `[b, s, k, c]`.
      q_positions: int `[b, t]`.
      kv_positions: int `[b, s]`.
      q_segment_ids: int `[b, t]`.
      kv_segment_ids: int `[b, s]`.
      scale: the factor of the scores, usually `c ** -0.5`.
      window: how many positions a query sees, itself included; an int, a traced scalar or None for all.
      softcap: the bound of the scores, or None.
      implementation: a key of `IMPLEMENTATIONS` or `"auto"`; see `chosen`.

    Returns:
      `[b, t, h, c]` in the dtype of `q`.

    Raises:
      ValueError: the named implementation cannot take these arrays.
    """
    run = IMPLEMENTATIONS[chosen(implementation, q=q, k=k)]
    return run(
        q,
        k,
        v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        softcap=softcap,
        scale=scale,
    )
