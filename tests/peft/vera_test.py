import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree, weights
from ftjax.peft.shared import Shared
from ftjax.peft.vera import VeraWeight
from tests.peft import formula


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_every_product_and_gradient_equals_the_formula(key, rank):
    keys = jax.random.split(key, 4)
    a, b = formula.normal(keys[0], 8, rank), formula.normal(keys[1], rank, 7)
    leaf = functools.partial(VeraWeight, a=Shared(a), b=Shared(b))
    arrays = {"lambda_d": formula.normal(keys[2], rank), "lambda_b": formula.normal(keys[3], 5)}

    def dense(base, lambda_d, lambda_b):
        return base + np.asarray(a, np.float64)[:6] @ np.diag(lambda_d) @ np.asarray(b, np.float64)[:, :5] @ np.diag(lambda_b)

    formula.check(leaf, dense, arrays, i=6, o=5, key=key)


def test_it_trains_what_the_paper_counts(key):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    method = peft.vera(["q_proj", "v_proj"], rank=256)
    trainable = jax.eval_shape(method.init, key, params)[1]
    assert tree.size(trainable) == 32 * (4096 + 256 + 1024 + 256)  # layers x modules x (o + r)


def test_a_step_holds_one_copy_of_the_projections(key):
    """A scan over layers must not widen what they share."""
    count, width, rank = 16, 32, 256
    params = {"layers": {"q_proj": {"kernel": jnp.zeros((count, width, width))}}}
    method = peft.vera(["q_proj"], rank=rank)
    frozen, trainable = method.init(key, params)

    def loss(trainable, frozen, x):
        layers = method.attach(frozen, trainable)["layers"]
        return jnp.sum(jax.lax.scan(lambda x, layer: (weights.dot(x, layer["q_proj"]["kernel"]), None), x, layers)[0])

    compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, jnp.ones((1, width))).compile()
    copy = 2 * rank * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * copy < count * copy


def test_other_projections_may_be_put_in_the_frozen_tree(key):
    params = {"q_proj": {"kernel": jnp.zeros((4, 6))}}
    method = peft.vera(["q_proj"], rank=2)
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(jnp.ones_like, trainable)
    frozen = {**frozen, "vera": {"a": jnp.full((4, 2), 2.0), "b": jnp.full((2, 6), 3.0)}}
    attached = method.attach(frozen, trainable)
    assert set(attached) == {"q_proj"}
    np.testing.assert_array_equal(weights.materialize(attached["q_proj"]["kernel"]), np.full((4, 6), 12.0))
    with pytest.raises(ValueError, match="the one that init returned"):
        method.attach(params, trainable)


def test_jit_does_not_compile_again_for_the_same_projections(key):
    method = peft.vera(["q_proj"], rank=2)
    frozen, trainable = method.init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
    use = jax.jit(lambda params, x: weights.dot(x, params["q_proj"]["kernel"]))
    for _ in range(2):
        use(method.attach(frozen, trainable), jnp.ones((1, 4)))
    assert use._cache_size() == 1


@pytest.mark.parametrize("options, message", [({"rank": 0}, "expected 1 to"), ({"d_initial": 0}, "no gradient")])
def test_bad_options_say_what_was_expected(key, options, message):
    with pytest.raises(ValueError, match=message):
        peft.vera(["q_proj"], **options).init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
