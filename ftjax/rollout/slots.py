"""Slots: rows of one cache in which sequences of any age are continued side by side, as three programs over arrays of fixed shape.

All rows are written at the same column of a ring, which the clock counts: a text that joins is laid so that it ends where the clock
stands. So a step writes one column, as in a batch that began together, and attention, which goes by positions and segments, does not mind
that the ring begins in its middle. `read` runs prompts packed into rows, `join` copies them into free slots, as often as they have
samples, and `write` continues all slots by a block of tokens. A prompt's last token is the first that `write` reads, so nothing is drawn
anywhere else. What a method puts before every row keeps the columns before the ring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax import models
from ftjax.models import virtual
from ftjax.models.cache import Cache
from ftjax.peft.mixed import NONE, assign_rows
from ftjax.rollout.sampling import Sampling, Seen, penalized, sample
from ftjax.sharding import ROWS, row_parts
from ftjax.types import Model, Params, pytree

NOTHING = -1
"""No token, no slot."""


@pytree
class Settings:
    """What a request asks for, an entry for each slot `[b]`."""

    max_tokens: jax.Array
    min_tokens: jax.Array | None
    """Until so many are written no stop id is chosen; None where nobody asks for any."""
    stop_ids: jax.Array
    """int32 `[b, m]`: the tokens that end a row, filled up with `NOTHING`."""
    keys: jax.Array
    """uint32 `[b, w]`: the data of a key; token `i` of the row is drawn with `fold_in(key, i)`."""
    sampling: Sampling
    adapters: jax.Array
    """int32 `[b]`: see `peft.assign_rows`."""
    states: jax.Array | None
    """int32 `[b]`: where a grammar stands, in a table of `grammar.tabulate`; None where nobody has one."""


@pytree
class Slots:
    """Rows on their way."""

    cache: Cache
    clock: jax.Array
    """int32 scalar: columns written since the ring was laid."""
    tokens: jax.Array
    """int32 `[b]`: read next."""
    positions: jax.Array
    """int32 `[b]`: theirs."""
    written: jax.Array
    """int32 `[b]`: tokens of the completion."""
    live: jax.Array
    """bool `[b]`."""
    settings: Settings
    seen: Seen | None
    """Kept where a request has penalties."""


@pytree
class Read:
    """Prompts packed into rows `[r, t]`."""

    tokens: jax.Array
    stem: jax.Array
    """int32 scalar: how many tokens of each prompt stand at the beginning of its row, for all of them."""
    cache: Cache


class Joining(NamedTuple):
    """Up to `b` samples and the slots that they take, of which the first `count` are meant."""

    count: jax.Array
    slots: jax.Array
    """int32 `[b]`: `NOTHING` for those that are not meant."""
    rows: jax.Array
    """int32 `[b]`: where their prompts lie in a `Read`."""
    starts: jax.Array
    """int32 `[b]`: of what comes after the stem."""
    lengths: jax.Array
    """int32 `[b]`: with the stem."""
    numbers: jax.Array
    """int32 `[b]`: folded into the sample's key, unless it is `NOTHING`."""
    settings: Settings


class Written(NamedTuple):
    """A block of `n` tokens for each slot; `tokens` is `NOTHING` where a row had ended, and from step `count` on."""

    tokens: jax.Array
    """int32 `[n, b]`."""
    logps: jax.Array
    """float32 `[n, b]`: under the model."""
    behavior_logps: jax.Array
    """float32 `[n, b]`: under the distribution that was drawn from."""


def columns(slots: Slots) -> int:
    """Return the size of the ring."""
    return jax.tree.leaves(slots.cache.k)[0].shape[-2] - slots.cache.virtual


@partial(jax.jit, static_argnames=("model", "num_columns", "layers_apart", "mesh"))
def empty(
    model: Model, params: Params, settings: Settings, *, num_columns: int, layers_apart: bool = False, mesh: Mesh | None = None
) -> Slots:
    """Return as many slots as `settings` has entries, free, for texts of up to `num_columns` tokens."""
    size, before = len(settings.max_tokens), sum(virtual.count(params))
    cache = models.init_cache(model.config, size, before + num_columns, _activations(model, params))
    zeros = jnp.zeros((size,), jnp.int32)
    seen = None
    if penalized(settings.sampling):
        shape = (size, vocabulary(model, params))
        seen = Seen(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))
    k, v = models.apart_cache(cache) if layers_apart else (cache.k, cache.v)
    cache = dataclasses.replace(cache, k=k, v=v, virtual=before)
    return _place(Slots(cache, jnp.zeros((), jnp.int32), zeros, zeros, zeros, jnp.zeros((size,), bool), settings, seen), mesh)


@partial(jax.jit, static_argnames="model")
def read(
    model: Model, params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, stem: jax.Array, adapters: jax.Array
) -> Read:
    """Read packed prompts `[r, t]`, each row of which has one adapter `[r]`; see `packing.packed`."""
    cache = models.init_cache(model.config, *tokens.shape, _activations(model, params))
    _, cache = model.apply(assign_rows(params, adapters), tokens, positions=positions, segment_ids=segment_ids, cache=cache)
    return Read(tokens, stem, cache)


@partial(jax.jit, static_argnames=("impl", "mesh"), donate_argnames="slots")
def join(slots: Slots, read: Read, joining: Joining, *, impl: str, mesh: Mesh | None = None) -> Slots:
    """Put samples into slots: their prompts but for the last token, which is read next."""
    at = jnp.where(joining.slots == NOTHING, len(slots.live), joining.slots)

    def put(into: jax.Array, values: jax.Array) -> jax.Array:
        return into.at[at].set(values.astype(into.dtype), mode="drop")

    settings = dataclasses.replace(joining.settings, keys=_numbered(joining, impl))
    last = joining.starts + joining.lengths - 1 - read.stem
    return _place(
        dataclasses.replace(
            slots,
            cache=_copy(slots, read, joining),
            tokens=put(slots.tokens, read.tokens[joining.rows, last]),
            positions=put(slots.positions, joining.lengths - 1),
            written=put(slots.written, jnp.zeros_like(last)),
            live=put(slots.live, joining.settings.max_tokens > 0),
            settings=jax.tree.map(put, slots.settings, settings),
            seen=None if slots.seen is None else _begin(put, slots.seen, read, joining),
        ),
        mesh,
    )


@partial(jax.jit, static_argnames=("model", "impl", "num_tokens", "mesh"), donate_argnames="slots")
def write(
    model: Model, params: Params, slots: Slots, patience: jax.Array, table=None, *, impl: str, num_tokens: int, mesh: Mesh | None = None
) -> tuple[Slots, Written]:
    """Write up to `num_tokens` tokens to each live slot, fewer if all end before, or more than `patience` of them.

    `table` `[n, v]` is that of all grammars: see `grammar.tabulate`.
    """
    blank = jnp.zeros((num_tokens, len(slots.live)), jnp.float32)
    written = Written(jnp.full(blank.shape, NOTHING, jnp.int32), blank, blank)
    params = assign_rows(params, slots.settings.adapters)
    began = jnp.sum(slots.live, dtype=jnp.int32)

    def going(carry) -> jax.Array:
        step, slots, _ = carry
        live = jnp.sum(slots.live, dtype=jnp.int32)
        return (step < num_tokens) & (live > 0) & (began - live <= patience)

    def body(carry):
        step, slots, written = carry
        slots, row = _step(model, params, slots, table, impl)
        return step + 1, slots, jax.tree.map(lambda into, x: jax.lax.dynamic_update_index_in_dim(into, x, step, 0), written, row)

    _, slots, written = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), slots, written))
    return _place(slots, mesh), written if mesh is None else _replicated(written, mesh)


@partial(jax.jit, donate_argnames="slots")
def leave(slots: Slots, ended: jax.Array) -> Slots:
    """Free the slots where `ended` `[b]` is true."""
    return dataclasses.replace(slots, live=slots.live & ~ended)


def keep(slots: Slots, chosen: np.ndarray) -> Slots:
    """Return the slots `chosen` `[m]` alone; the cache of `slots` is used up."""

    def rows(x: jax.Array) -> jax.Array:
        return _rows(x, chosen, axis=0)

    ids = {name: rows(getattr(slots.cache, name)) for name in ("positions", "segment_ids")}
    own = ("tokens", "positions", "written", "live", "settings", "seen")
    rest = {name: jax.tree.map(rows, getattr(slots, name)) for name in own}
    cache = _one_by_one(slots.cache, lambda x: _rows(x, chosen, axis=-4))
    return dataclasses.replace(slots, cache=dataclasses.replace(cache, **ids), **rest)


@partial(jax.jit, static_argnames="axis")
def _rows(x: jax.Array, chosen: jax.Array, *, axis: int) -> jax.Array:
    return jnp.take(x, chosen, axis=axis)


def _one_by_one(cache: Cache, change: Callable[[jax.Array], jax.Array]) -> Cache:
    """Return the cache with its keys and values changed, each deleted when it has been, so that no second one stands beside the first."""

    def changed(x: jax.Array) -> jax.Array:
        other = change(x)
        x.delete()
        return other

    return dataclasses.replace(cache, k=jax.tree.map(changed, cache.k), v=jax.tree.map(changed, cache.v))


def resize(slots: Slots, num_columns: int) -> Slots:
    """Return the slots, whose layers lie apart, with a ring of another size that has the newest columns, and a clock at its beginning.

    The cache of `slots` is used up.
    """

    def resized(x: jax.Array, axis: int) -> jax.Array:
        return _resized(x, slots.clock, axis=axis, before=slots.cache.virtual, num_columns=num_columns)

    ids = {name: resized(getattr(slots.cache, name), 1) for name in ("positions", "segment_ids")}
    cache = _one_by_one(slots.cache, partial(resized, axis=2))
    return dataclasses.replace(slots, cache=dataclasses.replace(cache, **ids), clock=jnp.zeros_like(slots.clock))


@partial(jax.jit, static_argnames=("axis", "before", "num_columns"))
def _resized(x: jax.Array, clock: jax.Array, *, axis: int, before: int, num_columns: int) -> jax.Array:
    """Return an array of the cache with its ring begun at the oldest column, the oldest left out or columns of 0 put before them."""
    ours, ring = jnp.split(x, [before], axis=axis)
    size = ring.shape[axis]
    ordered = jnp.roll(ring, -(clock % size), axis=axis)
    ordered = jax.lax.slice_in_dim(ordered, max(size - num_columns, 0), size, axis=axis)
    pads = [(max(num_columns - size, 0) if at == axis else 0, 0) for at in range(x.ndim)]
    return jnp.concatenate([ours, jnp.pad(ordered, pads)], axis=axis)


def _step(model: Model, params: Params, slots: Slots, table: jax.Array | None, impl: str) -> tuple[Slots, Written]:
    settings, live = slots.settings, slots.live
    cache = dataclasses.replace(slots.cache, index=slots.cache.virtual + slots.clock % columns(slots))
    hidden, cache = model.apply(
        params, slots.tokens[:, None], positions=slots.positions[:, None], segment_ids=live[:, None].astype(jnp.int32), cache=cache
    )
    logits = model.unembed(model.head(params), hidden[:, 0])
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(settings.keys, impl=impl), slots.written)
    draw = sample(logits, keys, settings.sampling, seen=slots.seen, allowed=_allowed(slots, table, logits.shape))
    tokens = jnp.where(live, draw.tokens, NOTHING)
    count = slots.written + live.astype(jnp.int32)
    ended = jnp.any(tokens[:, None] == settings.stop_ids, axis=1) | (count >= settings.max_tokens)
    if table is not None:
        settings = dataclasses.replace(settings, states=table[settings.states, draw.tokens])
    slots = dataclasses.replace(
        slots,
        cache=cache,
        settings=settings,
        clock=slots.clock + 1,
        tokens=draw.tokens,
        positions=slots.positions + 1,
        written=count,
        live=live & ~ended,
        seen=slots.seen and dataclasses.replace(slots.seen, written=slots.seen.written.at[jnp.arange(len(live)), draw.tokens].add(1)),
    )
    return slots, Written(tokens, jnp.where(live, draw.logps, 0.0), jnp.where(live, draw.behavior_logps, 0.0))


def _allowed(slots: Slots, table: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """Return bool `[b, v]`: the tokens that a grammar allows, but none that would end a row too early."""
    settings = slots.settings
    allowed = None if table is None else table[settings.states] != NOTHING
    if settings.min_tokens is None:
        return allowed
    allowed = jnp.ones(shape, bool) if allowed is None else allowed
    early = slots.written < settings.min_tokens
    ids = jnp.where(early[:, None] & (settings.stop_ids != NOTHING), settings.stop_ids, shape[1])
    return allowed.at[jnp.arange(shape[0])[:, None], ids].set(False, mode="drop")


def _numbered(joining: Joining, impl: str) -> jax.Array:
    """Return the data of the samples' keys, their numbers folded in."""
    keys = jax.random.wrap_key_data(joining.settings.keys, impl=impl)
    folded = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, joining.numbers))
    return jnp.where((joining.numbers == NOTHING)[:, None], joining.settings.keys, folded)


def _copy(slots: Slots, read: Read, joining: Joining) -> Cache:
    """Return the cache with the keys and values of prompts in their slots, as if they had just been written."""
    before, size = slots.cache.virtual, columns(slots)
    column = jnp.arange(before + size)
    age = (slots.clock - 1 - (column - before)) % size  # 0 for the column that was written last

    def one(n: jax.Array, cache: Cache) -> Cache:
        slot, row, count = joining.slots[n], joining.rows[n], joining.lengths[n] - 1
        ours, real = column < before, age < count
        token = count - 1 - age  # of the prompt
        there = jnp.where(token < read.stem, token, joining.starts[n] + token - read.stem)
        source = jnp.where(ours, column, before + jnp.where(real, there, 0))
        segments = jnp.where(ours, read.cache.segment_ids[row][source], real.astype(jnp.int32))

        def put(into: jax.Array, values: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(into, values, slot, axis)

        def lay(into, given: jax.Array):
            if isinstance(into, tuple):
                return tuple(map(lay, into, given))
            return put(into, jnp.take(given[..., row, :, :, :], source, axis=-2), -4)

        return dataclasses.replace(
            cache,
            k=lay(cache.k, read.cache.k),
            v=lay(cache.v, read.cache.v),
            positions=put(cache.positions, read.cache.positions[row][source], 0),
            segment_ids=put(cache.segment_ids, segments, 0),
        )

    return jax.lax.fori_loop(0, joining.count, one, slots.cache)


def _begin(put, seen: Seen, read: Read, joining: Joining) -> Seen:
    """Return what has been seen when the prompts are read."""
    column = jnp.arange(read.tokens.shape[1])[None, :]
    time = column - joining.starts[:, None]
    inside = ((time >= 0) & (time < joining.lengths[:, None] - read.stem)) | (column < read.stem)
    ids = jnp.where(inside, read.tokens[joining.rows], seen.prompted.shape[1])
    prompted = jnp.zeros(seen.prompted.shape, bool).at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")
    return Seen(put(seen.prompted, prompted), put(seen.written, jnp.zeros_like(seen.written)))


def _activations(model: Model, params: Params) -> jnp.dtype:
    params = assign_rows(params, jnp.full((1,), NONE))
    return jax.eval_shape(lambda: model.apply(params, jnp.zeros((1, 1), jnp.int32))[0]).dtype


def vocabulary(model: Model, params: Params) -> int:
    params = assign_rows(params, jnp.full((1,), NONE))
    return jax.eval_shape(lambda: model.unembed(model.head(params), model.apply(params, jnp.zeros((1, 1), jnp.int32))[0])).shape[-1]


def cache_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return how keys or values `[l, b, k, s, c]` lie on a mesh: split over its rows and heads, where they divide by it."""
    _, rows, heads, *_ = shape
    split = P(None, ROWS if rows % row_parts(mesh) == 0 else None, "tensor" if heads % mesh.shape["tensor"] == 0 else None)
    return NamedSharding(mesh, split)


def _place(slots: Slots, mesh: Mesh | None) -> Slots:
    """Split the cache as `cache_sharding` says, and have the rest on every device."""
    if mesh is None:
        return slots
    where = cache_sharding(slots.cache.k.shape, mesh)
    rest = _replicated(dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, k=None, v=None)), mesh)
    k, v = (jax.lax.with_sharding_constraint(x, where) for x in (slots.cache.k, slots.cache.v))
    return dataclasses.replace(rest, cache=dataclasses.replace(rest.cache, k=k, v=v))


def _replicated(arrays, mesh: Mesh):
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), arrays)
