"""OFT and BOFT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree
from ftjax.peft.boft import BoftWeight, butterfly
from ftjax.peft.oft import OftWeight, cayley
from tests.peft import formula


def rotation(skew):
    return (np.eye(len(skew)) - skew) @ np.linalg.inv(np.eye(len(skew)) + skew)


def series(skew):
    power = np.linalg.matrix_power
    return np.eye(len(skew)) + 2 * skew + 2 * power(skew, 2) + 2 * power(skew, 3) + power(skew, 4)


def block_diagonal(blocks):
    size = len(blocks[0])
    out = np.zeros((len(blocks) * size,) * 2)
    for n, block in enumerate(blocks):
        out[n * size : (n + 1) * size, n * size : (n + 1) * size] = block
    return out


@pytest.mark.parametrize("terms, turn", [(0, rotation), (5, series)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_oft_equals_the_formula(key, terms, turn, blocks):
    def dense(base, skew):
        upper = np.zeros((blocks, 3, 3))
        for block, numbers in zip(upper, skew, strict=True):
            block[np.triu_indices(3, 1)] = numbers
        turned = [turn(q - q.T) for q in upper]
        return block_diagonal(turned * (2 // blocks)) @ base

    leaf = functools.partial(OftWeight, block_size=3, neumann_terms=terms)
    formula.check(leaf, dense, {"skew": 0.3 * formula.normal(key, blocks, 3)}, i=6, o=5, key=key)


@pytest.mark.parametrize("block_size, factors", [(4, 1), (2, 3), (4, 2)])
def test_boft_equals_the_formula(key, block_size, factors):
    def dense(base, blocks, outputs):
        product = np.eye(8)
        for factor, block in enumerate(blocks):
            order = butterfly(8, block_size, factor)
            p = np.eye(8)[order]
            product = p @ block_diagonal([rotation((b - b.T) / 2) for b in block]) @ p.T @ product
        return product @ base * outputs[None, :]

    arrays = {"blocks": formula.normal(key, factors, 8 // block_size, block_size, block_size), "outputs": formula.normal(key, 5)}
    formula.check(BoftWeight, dense, arrays, i=8, o=5, key=key)


def test_the_exact_rotation_is_orthogonal_and_the_series_near_its_inverse(key):
    q = 0.05 * formula.normal(key, 3, 4, 4)
    q = q - jnp.swapaxes(q, -1, -2)
    exact = cayley(q)
    np.testing.assert_allclose(exact @ jnp.swapaxes(exact, -1, -2), np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-6)
    np.testing.assert_allclose(cayley(q, 8), jnp.swapaxes(exact, -1, -2), atol=1e-5)


def test_a_whole_butterfly_mixes_every_channel_with_every_other(key):
    w = BoftWeight(jnp.eye(8), formula.normal(key, 3, 4, 2, 2), jnp.ones(8))
    assert float(jnp.abs(w.materialize()).min()) > 1e-5


def test_they_train_what_the_papers_count(key):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    count = lambda method: tree.size(jax.eval_shape(method.init, key, params)[1])  # noqa: E731
    assert count(peft.oft(["q_proj"], block_size=32)) == 32 * (4096 // 32) * (32 * 31 // 2)
    assert count(peft.oft(["q_proj"], block_size=32, share=True)) == 32 * (32 * 31 // 2)
    assert count(peft.boft(["k_proj"], block_size=4, factors=3)) == 32 * (3 * (4096 // 4) * 4**2 + 1024)


@pytest.mark.parametrize(
    "method, options, message",
    [
        (peft.oft, {"block_size": 5}, "to divide the 8 rows of 'q_proj/kernel' .8, 6.; nearest: 4"),
        (peft.oft, {"neumann_terms": 2}, "at least 4"),
        (peft.boft, {"block_size": 4, "factors": 3}, "need 16 to divide the 8 rows"),
        (peft.boft, {"block_size": 3, "factors": 2}, "an even block_size"),
    ],
)
def test_bad_options_say_what_was_expected(key, method, options, message):
    with pytest.raises(ValueError, match=message):
        method(["q_proj"], **options).init(key, {"q_proj": {"kernel": jnp.zeros((8, 6))}})
