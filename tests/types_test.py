import math

import jax.numpy as jnp

from ftjax.types import Mean, masked_mean


def test_means_add_before_they_are_divided():
    mean = Mean(jnp.array(3.0), jnp.array(1.0)) + Mean(jnp.array(1.0), jnp.array(3.0))
    assert mean.value() == 1.0  # and not (3 + 1/3) / 2


def test_an_empty_mean_is_nan():
    assert math.isnan(Mean(jnp.array(0.0), jnp.array(0.0)).value())


def test_a_masked_value_does_not_count_even_if_it_is_not_finite():
    mean = masked_mean(jnp.array([1.0, jnp.nan, jnp.inf, 3.0]), jnp.array([1.0, 0.0, 0.0, 1.0]))
    assert mean.value() == 2.0
