import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftjax import models, peft, tree
from ftjax.peft.lokr import LokrWeight, factorize
from tests.peft import formula

SIZES = {"w1": (3, 2), "w2": (2, 5), "w1_a": (3, 2), "w1_b": (2, 2), "w2_a": (2, 1), "w2_b": (1, 5)}


@pytest.mark.parametrize("fields", [("w1", "w2"), ("w1", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2"), ("w1_a", "w1_b", "w2_a", "w2_b")])
def test_every_product_and_gradient_equals_the_formula(key, fields):
    arrays = {field: formula.normal(jax.random.fold_in(key, n), *SIZES[field]) for n, field in enumerate(fields)}

    def dense(base, w1=None, w2=None, w1_a=None, w1_b=None, w2_a=None, w2_b=None):
        return base + 0.5 * np.kron(w1_a @ w1_b if w1 is None else w1, w2_a @ w2_b if w2 is None else w2)

    formula.check(functools.partial(LokrWeight, scale=0.5), dense, arrays, i=6, o=10, key=key)


@given(st.integers(1, 5000), st.sampled_from([-1, 1, 4, 8, 30]))
def test_the_split_is_exact_and_as_even_as_can_be(size, factor):
    m, n = factorize(size, factor)
    assert m * n == size
    if not (factor > 0 and size % factor == 0):
        limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
        assert m <= limit and not any(size % other == 0 for other in range(m + 1, limit + 1))


def test_it_trains_what_the_factors_hold(key):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    trainable = jax.eval_shape(peft.lokr(["q_proj"], rank=8).init, key, params)[1]
    assert tree.size(trainable) == 32 * (64 * 64 + 8 * (64 + 64))


@pytest.mark.parametrize("options, message", [({"rank": 5}, "expected 1 to 4"), ({"decompose_factor": 0}, "-1 or at least 1")])
def test_bad_options_say_what_was_expected(key, options, message):
    with pytest.raises(ValueError, match=message):
        peft.lokr(["q_proj"], **options).init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
