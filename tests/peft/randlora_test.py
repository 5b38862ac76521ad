import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree, weights
from ftjax.peft.projections import BASES, TorchGenerator
from ftjax.peft.randlora import RandloraWeight
from ftjax.peft.shared import Shared
from tests.peft import formula


@pytest.mark.parametrize("i, o, rank", [(6, 5, 2), (5, 6, 2), (4, 4, 1), (4, 5, 4)])
def test_every_product_and_gradient_equals_the_formula(key, i, o, rank):
    small, large, count = min(i, o), max(i, o), -(-min(i, o) // rank)
    keys = jax.random.split(key, 4)
    a, b = formula.normal(keys[0], rank, small + 1), formula.normal(keys[1], large + 1, count + 1, rank)
    arrays = {"lambdas": formula.normal(keys[2], rank, count), "gammas": formula.normal(keys[3], count, small)}

    def dense(base, lambdas, gammas):
        rows = [lambdas[j, n] * np.asarray(a, np.float64)[j, :small] * gammas[n] for j in range(rank) for n in range(count)]
        columns = [np.asarray(b, np.float64)[:large, n, j] for n in range(count) for j in range(rank)]
        change = sum(np.outer(column, row) for column, row in zip(columns, rows, strict=True))
        return base + 0.5 * (change.T if i <= o else change)

    leaf = functools.partial(RandloraWeight, a=Shared(a), b=Shared(b), scale=0.5)
    formula.check(leaf, dense, arrays, i=i, o=o, key=key)


def test_the_change_has_full_rank(key):
    params = {"q_proj": {"kernel": jnp.zeros((12, 16))}}
    method = peft.randlora(["q_proj"], rank=5)
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: jax.random.normal(key, x.shape), trainable)
    assert np.linalg.matrix_rank(weights.materialize(method.attach(frozen, trainable)["q_proj"]["kernel"])) == 12


def test_it_trains_what_the_paper_counts(key):
    params = jax.eval_shape(models.build(models.preset("tiny-llama")).init, key)
    trainable = jax.eval_shape(peft.randlora(["down_proj"], rank=8).init, key, params)[1]
    layers, i, o = params["layers"]["mlp"]["down_proj"]["kernel"].shape
    assert tree.size(trainable) == layers * (-(-min(i, o) // 8)) * (8 + min(i, o))


@pytest.mark.parametrize("bases, share", [("uniform", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / 8)])
def test_bases_have_unit_deviation_and_as_many_zeros_as_said(bases, share):
    a, b = BASES[bases](TorchGenerator(3), 16, 64, 80)
    assert a.shape == (16, 64) and b.shape == (80, 4, 16)
    for x in (a, b):
        assert np.std(x) == pytest.approx(1, rel=0.01)
        assert np.mean(x != 0) == pytest.approx(share, abs=0.02 if bases != "uniform" else 0.01)


@pytest.mark.parametrize("options, message", [({"rank": 5}, "expected 1 to 4"), ({"bases": "spars"}, "nearest: 'sparse'")])
def test_bad_options_say_what_was_expected(key, options, message):
    with pytest.raises(ValueError, match=message):
        peft.randlora(["q_proj"], **options).init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
