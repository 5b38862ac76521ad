"""Blocks of queries give what the equation gives, and so do their gradients; padding stays finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.kernels import attention


def inputs(key, *, b=2, t=200, s=None, h=4, k=2, c=8, dtype=jnp.float32):
    """Two documents and some padding on the left in every row; with `s`, the queries are the row's last `t` tokens."""
    s = s or t
    shapes = {"q": (b, t, h, c), "k": (b, s, k, c), "v": (b, s, k, c)}
    arrays = {name: 2 * jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
    slots = np.arange(s)
    starts = np.array([5 + s // 3, 2 + s // 2])[:b, None]  # where the second document of each row begins
    segments = np.where(slots[None] < 5, 0, np.where(slots[None] < starts, 1, 2)).astype(np.int32)
    positions = np.where(segments == 2, slots[None] - starts, np.maximum(slots[None] - 5, 0)).astype(np.int32)
    positions = np.where(segments == 0, slots[None], positions).astype(np.int32)
    ids = {"kv_positions": positions, "kv_segment_ids": segments, "q_positions": positions[:, -t:], "q_segment_ids": segments[:, -t:]}
    return arrays, {name: jnp.asarray(value) for name, value in ids.items()}


def value_and_gradients(implementation, arrays, ids, **options):
    def f(arrays):
        out = attention.attention(**arrays, **ids, scale=0.3, implementation=implementation, **options)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), gradients = jax.jit(jax.value_and_grad(f, has_aux=True))(arrays)
    return {"out": out, **gradients}


def assert_equal(actual, expected, tolerance):
    for name in expected:
        a, e = (np.asarray(tree[name], np.float32) for tree in (actual, expected))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(), err_msg=name)


CASES = {
    "ragged": {},
    "whole blocks": {"t": 256},
    "one block": {"t": 40},
    "no sharing": {"k": 4},
    "one key head": {"k": 1},
    "window": {"window": 50},
    "traced window": {"window": jnp.int32(50)},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"window": 130, "softcap": 1.5},
    "part of a row": {"t": 140, "s": 200, "window": 50},
}


@pytest.mark.parametrize(("case", "each"), [*((case, "vmap") for case in CASES), ("ragged", "map"), ("window and softcap", "map")])
def test_blocked_equals_reference_with_gradients(case, each, key):
    options = dict(CASES[case])
    shape = {name: options.pop(name) for name in ("t", "s", "k") if name in options}
    arrays, ids = inputs(key, **shape)
    expected = value_and_gradients("reference", arrays, ids, **options)
    assert_equal(value_and_gradients(f"blocked_{each}", arrays, ids, **options), expected, 2e-6)


def test_blocked_equals_reference_in_bfloat16(key):
    arrays, ids = inputs(key, t=140, dtype=jnp.bfloat16)
    assert_equal(value_and_gradients("blocked", arrays, ids), value_and_gradients("reference", arrays, ids), 2**-6)


def test_long_rows_have_few_blocks(key):
    arrays, ids = inputs(key, b=1, t=2500, h=1, k=1)
    blocked = functools.partial(attention.attention, **ids, scale=0.3, implementation="blocked_vmap")
    text = str(jax.make_jaxpr(lambda arrays: blocked(**arrays))(arrays))
    assert text.count("= exp") == math.ceil(2500 / 256)


def test_reference_is_the_equation():
    """By hand: one head, scores q·k = [0, ln 3] at scale 1, so the second token takes a quarter of the first value and three of its own."""
    q = jnp.ones((1, 2, 1, 1))
    k = jnp.array([0.0, math.log(3)]).reshape(1, 2, 1, 1)
    v = jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1)
    positions, segments = jnp.array([[0, 1]]), jnp.ones((1, 2), jnp.int32)
    ids = {"q_positions": positions, "kv_positions": positions, "q_segment_ids": segments, "kv_segment_ids": segments}
    out = attention.attention(q, k, v, **ids, scale=1.0, implementation="reference")
    np.testing.assert_allclose(out.reshape(-1), [4.0, 7.0], rtol=1e-6)


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_a_row_of_padding_is_finite(implementation, key):
    arrays, ids = inputs(key, t=40)
    ids = {**ids, "q_segment_ids": jnp.zeros((2, 40), jnp.int32)}  # and not even padding among the keys of the second document
    ids["kv_segment_ids"] = ids["kv_segment_ids"].at[1].set(7)
    for name, value in value_and_gradients(implementation, arrays, ids).items():
        assert jnp.all(jnp.isfinite(value)), name


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_a_key_that_cannot_be_seen_changes_nothing(implementation, key):
    arrays, ids = inputs(key, t=140)
    out = attention.attention(**arrays, **ids, scale=0.3, implementation=implementation)
    changed = {**arrays, "k": arrays["k"].at[:, 130:].add(9.0), "v": arrays["v"].at[:, 130:].add(9.0)}
    other = attention.attention(**changed, **ids, scale=0.3, implementation=implementation)
    np.testing.assert_array_equal(out[:, :130], other[:, :130])
    assert not np.array_equal(out[:, 130:], other[:, 130:])


def test_auto_says_what_it_runs_and_a_named_one_is_never_replaced(key):
    (arrays, _), (one, _) = inputs(key, t=40), inputs(key, t=1, s=40)
    assert attention.chosen("auto", q=arrays["q"], k=arrays["k"]) == "blocked"
    assert attention.chosen("auto", q=one["q"], k=one["k"]) == "reference"
    assert attention.chosen("blocked", q=one["q"], k=one["k"]) == "blocked"
    with pytest.raises(ValueError, match="nearest: 'blocked'"):
        attention.chosen("blokced", q=arrays["q"], k=arrays["k"])
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        attention.chosen("auto", q=arrays["q"], k=jax.ShapeDtypeStruct((2, 40, 3, 8), jnp.float32))
