"""Causal attention over packed rows: one equation, several implementations that must equal it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.kernels.attention import blocked, groups, reference

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.attention,
    "keys_first": functools.partial(reference.attention, keys_first=True),
    "blocked": blocked.attention,
    "blocked_map": functools.partial(blocked.attention, each="map"),
    "blocked_vmap": functools.partial(blocked.attention, each="vmap"),
}
"""`"blocked"` visits heads one after another on a CPU and all at once elsewhere; the two forms can also be named."""
MANY_KEYS = 256
"""From so many on `"keys_first"` is faster for a single query: on a CPU by a sixth with 384 keys of 64 rows, and with JAX 0.12; 0.10 takes
half as long again with it."""


def supports(implementation: str, *, q: jax.Array, k: jax.Array, group_tokens: int | None = None) -> str | None:
    """Return why `implementation` cannot take these arrays (or shapes), or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"there is no attention {implementation!r}; nearest: {tree.nearest(implementation, IMPLEMENTATIONS)}"
    if q.shape[2] % k.shape[2]:
        return f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly"
    return groups.problem(group_tokens)


def chosen(implementation: str, *, q: jax.Array, k: jax.Array, group_tokens: int | None = None) -> str:
    """Return the name of the implementation that `attention` runs for these arrays (or shapes).

    `"auto"` is `"blocked"`, except for a single query (a step of decoding), which has no diagonal and fits the plain equation, on a CPU in
    the form that is faster.

    Raises:
      ValueError: `implementation` was named and cannot run; nothing else is run in its place.
    """
    name = implementation if implementation != "auto" else (_of_one_query(k.shape[1]) if q.shape[1] == 1 else "blocked")
    reason = supports(name, q=q, k=k, group_tokens=group_tokens)
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
    group_tokens: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Return causal attention, `softmax(cap(q kᵀ · scale)) v` over the visible keys, with the softmax in float32.

    A query sees a key of its own segment whose position is not later than its own and, with a window, less than `window` before it.
    A query of a segment that branches off another (`types.BRANCH`) sees that one too, and every query the keys of segment `mask.EVERYONE`,
    by the same rule of positions. Segment 0 is padding: no real token sees it, and its outputs are finite and mean nothing.

    The queries must be tokens of the rows that the keys are of, in the same order, query i at key s - t + i or before (a cache has empty
    slots behind it), and positions must rise by at least one along a segment, so that a key later in the row is never visible: blocks of
    queries then stop at the diagonal. A window given as an int also lets them begin at its start where `t == s`; keys of everyone's, or of
    a segment that others branch off, that lie further back in the row need it as an array, and groups want rows without branches.

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
      group_tokens: the size of the groups that attention stays in, half of the heads in shifted ones, or None: see `groups`. It narrows the
        window, also for keys of everyone's.
      softcap: the bound of the scores, or None.
      implementation: a key of `IMPLEMENTATIONS` or `"auto"`; see `chosen`.

    Returns:
      `[b, t, h, c]` in the dtype of `q`.

    Raises:
      ValueError: the named implementation cannot take these arrays.
    """
    run = IMPLEMENTATIONS[chosen(implementation, q=q, k=k, group_tokens=group_tokens)]
    reach = window if isinstance(window, int) else None
    if group_tokens is not None:
        k, v = groups.apart(k, v, q.shape[2])
        narrow = groups.windows(q_positions, group_tokens, num_heads=q.shape[2], num_key_heads=k.shape[2])
        window = narrow if window is None else jnp.minimum(narrow, window)
        reach = group_tokens if reach is None else min(reach, group_tokens)
    return run(
        q,
        k,
        v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        reach=reach,
        softcap=softcap,
        scale=scale,
    )


def _of_one_query(num_keys: int) -> str:
    faster = jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12) and num_keys >= MANY_KEYS
    return "keys_first" if faster else "reference"
