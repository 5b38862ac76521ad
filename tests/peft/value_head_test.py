from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ftjax import peft, scoring
from tests import toy
from tests.peft import formula


@pytest.fixture
def headed(key):
    params = toy.init(key)
    return params | {"value_head": {"kernel": formula.normal(key, toy.DIM, 1), "bias": jnp.full((1,), 0.3)}}


def values(params, batch):
    return scoring.score(toy.MODEL, params, batch, outputs=("values",)).values


def test_values_are_those_of_the_state_after_each_token(headed, key):
    batch = toy.batch(key, packed=True)
    hidden, _ = toy.apply(headed, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    want = formula.double(hidden) @ formula.double(headed["value_head"]["kernel"])[:, 0] + 0.3
    np.testing.assert_allclose(values(headed, batch), want, rtol=1e-5, atol=1e-6)
    pairs = jax.tree.map(lambda x: x.reshape(2, 2, -1), batch)
    np.testing.assert_allclose(values(headed, pairs).reshape(want.shape), want, rtol=1e-5, atol=1e-6)


def test_padding_has_no_value_and_no_gradient_whatever_it_holds(headed, key):
    batch = toy.batch(key)
    batch = type(batch)(batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids.at[:, 6:].set(0))
    poisoned = toy.MODEL._replace(
        apply=lambda params, tokens, segment_ids, **rest: (
            jnp.where(segment_ids[..., None] > 0, toy.apply(params, tokens, segment_ids=segment_ids, **rest)[0], jnp.nan),
            None,
        )
    )
    score = partial(scoring.score, poisoned, outputs=("values",))
    got = score(headed, batch).values
    assert jnp.all(got[:, 6:] == 0) and jnp.all(got[:, :6] != 0)
    gradient = jax.grad(lambda params: jnp.sum(score(params, batch).values))(headed)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_the_gradient_reaches_head_and_trunk_and_is_that_of_finite_differences(headed, key):
    batch = toy.batch(key)
    check_grads(
        lambda params: jnp.sum(jnp.sin(values(jax.tree.map(jnp.asarray, params), batch))),
        (headed,),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
        eps=1e-3,
    )
    gradient = jax.grad(lambda params: jnp.sum(values(params, batch)))(headed)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_a_head_beside_a_bfloat16_trunk_works_in_float32(headed, key):
    small = {
        name: branch if name == "value_head" else jax.tree.map(lambda x: x.astype(jnp.bfloat16), branch) for name, branch in headed.items()
    }
    batch = toy.batch(key)
    hidden, _ = toy.apply(small, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    want = formula.double(hidden) @ formula.double(headed["value_head"]["kernel"])[:, 0] + 0.3
    np.testing.assert_allclose(values(small, batch), want, rtol=1e-5, atol=1e-5)


def test_values_without_a_head_are_an_error_that_names_the_method(key):
    with pytest.raises(ValueError, match=r"no value head: add peft.value_head\(\)"):
        values(toy.init(key), toy.batch(key))


def test_it_starts_at_zero_normal_or_at_the_head_that_is_there(headed, key):
    wide = {"norm": {"scale": jnp.ones(4096)}}
    assert not jnp.any(peft.value_head().init(key, wide)[1]["value_head"]["kernel"])
    kernel = peft.value_head(init="normal", bias=False).init(key, wide)[1]["value_head"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), 1 / np.sqrt(4097), rtol=0.05)
    frozen, trainable = peft.value_head(bias=False).init(key, headed)
    np.testing.assert_array_equal(trainable["value_head"]["kernel"], headed["value_head"]["kernel"])
    assert peft.value_head().attach(frozen, trainable)["value_head"] is trainable["value_head"]


def test_bad_options_say_what_was_expected(key):
    with pytest.raises(ValueError, match="'zeros' or 'normal', not 'ones'"):
        peft.value_head(init="ones")
    with pytest.raises(ValueError, match="value_head: pattern 'norm/skale' matched no leaf; nearest: 'norm/scale'"):
        peft.value_head(reads="norm/skale").init(key, toy.init(key))
