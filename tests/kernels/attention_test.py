"""Blocks of queries give what the equation gives, and so do their gradients; padding stays finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.kernels import attention
from ftjax.kernels.attention import banded, block
from ftjax.types import BRANCH


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
    "groups that split a key head": {"t": 520, "h": 3, "k": 1, "group_tokens": 256, "softcap": 1.5},
    "groups and a window": {"group_tokens": 96, "window": 50},
    "groups and a traced window": {"group_tokens": 48, "window": jnp.int32(30)},
}


@pytest.mark.parametrize(
    ("case", "each"),
    [*((case, "vmap") for case in CASES), ("ragged", "map"), ("window and softcap", "map"), ("groups that split a key head", "map")],
)
def test_blocked_equals_reference_with_gradients(case, each, key):
    options = dict(CASES[case])
    shape = {name: options.pop(name) for name in ("t", "s", "h", "k") if name in options}
    arrays, ids = inputs(key, **shape)
    expected = value_and_gradients("reference", arrays, ids, **options)
    assert_equal(value_and_gradients(f"blocked_{each}", arrays, ids, **options), expected, 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 50, "softcap": 1.5}], ids=str)
def test_keys_first_equals_reference_for_one_query(options, dtype, key):
    arrays, ids = inputs(key, t=1, s=300, dtype=dtype)
    expected = value_and_gradients("reference", arrays, ids, **options)
    assert_equal(value_and_gradients("keys_first", arrays, ids, **options), expected, 2e-6 if dtype == jnp.float32 else 2**-8)


def by_mask(arrays, ids, group_tokens):
    """Shifted sparse attention as the paper has it: query heads one by one, a mask of segments, causality and groups."""
    h, k = arrays["q"].shape[2], arrays["k"].shape[2]
    keys, values = (jnp.repeat(arrays[name], h // k, axis=2) for name in ("k", "v"))
    positions, segments = ids["q_positions"], ids["q_segment_ids"]
    seen = (positions[:, :, None] >= positions[:, None, :]) & (segments[:, :, None] == segments[:, None, :])
    outs = []
    for head in range(h):
        group = (positions + (group_tokens // 2 if head >= h // 2 else 0)) // group_tokens
        scores = 0.3 * jnp.einsum("btc,bsc->bts", arrays["q"][:, :, head], keys[:, :, head])
        weights = jax.nn.softmax(jnp.where(seen & (group[:, :, None] == group[:, None, :]), scores, -1e30), axis=-1)
        outs.append(jnp.einsum("bts,bsc->btc", weights, values[:, :, head]))
    return jnp.stack(outs, axis=2)


@pytest.mark.parametrize(("h", "k"), [(4, 1), (6, 3)])
def test_shifted_groups_are_the_mask_of_the_paper_without_its_leak(h, k, key):
    arrays, ids = inputs(key, b=1, t=140, h=h, k=k)

    def f(arrays):
        out = by_mask(arrays, ids, 48)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(f, has_aux=True))(arrays)
    assert_equal(value_and_gradients("blocked_vmap", arrays, ids, group_tokens=48), {"out": out, **gradients}, 2e-6)


def test_shifted_groups_of_packed_documents_are_those_of_each_alone(key):
    arrays, ids = inputs(key, b=1, t=140)
    attend = jax.jit(functools.partial(attention.attention, scale=0.3, group_tokens=32, implementation="reference"))
    packed = attend(**arrays, **ids)
    for segment in (1, 2):
        places = np.flatnonzero(ids["q_segment_ids"][0] == segment)
        alone = attend(**{n: x[:, places] for n, x in arrays.items()}, **{n: x[:, places] for n, x in ids.items()})
        np.testing.assert_allclose(packed[:, places], alone, rtol=0, atol=1e-5)


def test_a_block_takes_its_keys_from_the_beginning_of_its_group():
    """By hand, groups of 512, blocks of 128: documents of 700 and 324 tokens, so that the sixth block holds the border, at place 700."""
    positions = jnp.concatenate([jnp.arange(700), jnp.arange(324)])
    for shift, expected in ((0, [0, 1, 2, 3, 0, 1, 1, 2]), (256, [0, 1, 0, 1, 2, 3, 1, 2])):
        row = block.Row(positions, positions, positions * 0, positions * 0, (positions + shift) % 512 + 1)
        band = banded._band(block.Form("map", None, 1.0, None, 512), row)
        assert band.widths == (128, 256, 384, 512, 640) and band.chosen.tolist() == expected


def test_the_cost_of_shifted_groups_grows_with_the_row_and_not_with_its_square():
    def flops(t, **options):
        arrays, ids = jax.eval_shape(lambda key: inputs(key, b=1, t=t, h=2, k=1), jax.random.key(0))
        f = functools.partial(attention.attention, scale=0.3, implementation="blocked_vmap", **options)
        return jax.jit(lambda arrays, ids: f(**arrays, **ids)).lower(arrays, ids).cost_analysis()["flops"]

    assert flops(2048, group_tokens=128) < 2.3 * flops(1024, group_tokens=128)
    assert flops(2048) > 3.5 * flops(1024)
    assert flops(2048, group_tokens=128) < 0.3 * flops(2048)


@pytest.mark.parametrize("size", [0, -4, 7])
def test_a_group_that_cannot_be_halved_is_refused(size, key):
    arrays, ids = inputs(key, t=40)
    with pytest.raises(ValueError, match=f"group_tokens must be a positive even number, .* not {size}"):
        attention.attention(**arrays, **ids, scale=0.3, group_tokens=size)


@pytest.mark.parametrize("options", [{}, {"t": 195, "s": 200}, {"window": jnp.int32(50)}], ids=["prompt", "prefix", "window"])
def test_keys_of_everyone_are_seen_by_all_documents(options, key):
    options = dict(options)
    arrays, ids = inputs(key, **{name: options.pop(name) for name in ("t", "s") if name in options})
    padded = value_and_gradients("reference", arrays, ids, **options)
    for side in ("q", "kv"):  # what was padding is the first five tokens
        segments, positions = ids[f"{side}_segment_ids"], ids[f"{side}_positions"]
        ids[f"{side}_positions"] = jnp.where(segments == 0, positions, positions + 5)
        ids[f"{side}_segment_ids"] = jnp.where(segments == 0, attention.mask.EVERYONE, segments)
    expected = value_and_gradients("reference", arrays, ids, **options)
    assert_equal(value_and_gradients("blocked_vmap", arrays, ids, **options), expected, 2e-6)
    starts = ids["q_positions"] == 5  # of documents
    assert np.abs(expected["out"] - padded["out"])[starts].min() > 1e-4


@pytest.mark.parametrize("implementation", ["reference", "blocked_vmap"])
def test_branches_see_their_stem_and_not_each_other(implementation, key):
    """Stems of 60 and 20 tokens in one row, with branches of 50, 40 and 30: the same as each branch behind its own copy of the stem."""
    sizes = [("stem", 1, 60), ("branch", 1, 50), ("branch", 1, 40), ("stem", 2, 20), ("branch", 2, 30)]
    arrays, _ = inputs(key, b=1, t=sum(size for *_, size in sizes))
    segments, positions, copies, trunk, start = [], [], [], [], 0
    for at, (kind, stem, size) in enumerate(sizes):
        before = next(size for kind, number, size in sizes if (kind, number) == ("stem", stem)) if kind == "branch" else 0
        segments += [stem + at * BRANCH if before else stem] * size
        positions += range(before, before + size)
        places = list(range(start, start + size))
        if before:
            copies.append((trunk + places, places))
        else:
            trunk = places
        start += size
    ids = [jnp.asarray(x, jnp.int32)[None] for x in (positions, positions, segments, segments)]
    names = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids")
    shared = attention.attention(**arrays, **dict(zip(names, ids, strict=True)), scale=0.3, implementation=implementation)
    for row, branch in copies:
        alone = {name: x[:, np.asarray(row)] for name, x in arrays.items()}
        order, ones = jnp.arange(len(row), dtype=jnp.int32)[None], jnp.ones((1, len(row)), jnp.int32)
        ids = dict(zip(names, (order, order, ones, ones), strict=True))
        out = attention.attention(**alone, **ids, scale=0.3, implementation=implementation)
        np.testing.assert_allclose(shared[:, np.asarray(branch)], out[:, -len(branch) :], rtol=0, atol=1e-5)


def test_blocks_behind_a_prefix_stop_at_the_diagonal(key):
    arrays, ids = inputs(key, t=256, s=261)
    arrays["v"] = arrays["v"].at[:, 5 + 128 :].set(jnp.nan)  # times no weight it would still be no number
    out = attention.attention(**arrays, **ids, scale=0.3, implementation="blocked")
    assert jnp.all(jnp.isfinite(out[:, :128])) and not jnp.any(jnp.isfinite(out[:, 128:]))


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
    many = jax.ShapeDtypeStruct((2, 256, 2, 8), jnp.float32)
    fast = jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12)
    assert attention.chosen("auto", q=one["q"], k=many) == ("keys_first" if fast else "reference")
    assert attention.chosen("blocked", q=one["q"], k=one["k"]) == "blocked"
    with pytest.raises(ValueError, match="nearest: 'blocked'"):
        attention.chosen("blokced", q=arrays["q"], k=arrays["k"])
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        attention.chosen("auto", q=arrays["q"], k=jax.ShapeDtypeStruct((2, 40, 3, 8), jnp.float32))
