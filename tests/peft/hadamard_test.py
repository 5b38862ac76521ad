"""HiRA and LoHa: what is multiplied entry by entry."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ftjax import models, peft, tree
from ftjax.peft.hira import HiraWeight
from ftjax.peft.loha import LohaWeight
from tests.peft import formula

sizes = pytest.mark.parametrize("i, o, rank", [(6, 5, 2), (1, 7, 1)])


def factors(key, i, o, rank, names):
    keys = jax.random.split(key, len(names))
    return {n: formula.normal(k, *((i, rank) if n[0] == "a" else (rank, o))) for n, k in zip(names, keys, strict=True)}


@sizes
def test_hira_equals_the_formula(key, i, o, rank):
    formula.check(HiraWeight, lambda base, a, b: base * (1 + a @ b), factors(key, i, o, rank, "ab"), i=i, o=o, key=key)


@sizes
def test_loha_equals_the_formula(key, i, o, rank):
    arrays = factors(key, i, o, rank, ("a1", "b1", "a2", "b2"))
    leaf = functools.partial(LohaWeight, scale=0.5)
    dense = lambda base, a1, b1, a2, b2: base + 0.5 * (a1 @ b1) * (a2 @ b2)  # noqa: E731
    formula.check(leaf, dense, arrays, i=i, o=o, key=key)


@pytest.mark.parametrize("method, times", [(peft.hira(rank=4), 1), (peft.loha(rank=4), 2)], ids=["hira", "loha"])
def test_they_train_what_the_papers_count(key, method, times):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert tree.size(jax.eval_shape(method.init, key, params)[1]) == 32 * times * 4 * sides


@pytest.mark.parametrize("method", [peft.hira, peft.loha])
def test_a_rank_above_the_matrix_is_refused(key, method):
    with pytest.raises(ValueError, match="rank 5 does not fit 'q_proj/kernel' with shape .4, 6.: expected 1 to 4"):
        method(["q_proj"], rank=5).init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
