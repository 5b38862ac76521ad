import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree
from ftjax.peft.shira import ShiraWeight
from tests.peft import formula


def test_every_product_and_gradient_equals_the_formula(key):
    places = jnp.array([3, 29, 8, 0, 17], jnp.int32)

    def dense(base, values, places):
        out = base.copy()
        for value, place in zip(values, places, strict=True):
            out[place // 5, place % 5] += value
        return out

    formula.check(ShiraWeight, dense, {"values": formula.normal(key, 5), "places": places}, i=6, o=5, key=key)


def test_places_are_distinct_differ_by_layer_and_come_from_the_seed(key):
    params = {"layers": {"q_proj": {"kernel": jnp.zeros((3, 8, 6))}}}
    places = [
        peft.shira(["q_proj"], rank=2, seed=s).init(key, params)[0]["shira"]["layers"]["q_proj"]["kernel"]["places"] for s in (0, 0, 1)
    ]
    assert all(len(set(row.tolist())) == 28 and 0 <= row.min() and row.max() < 48 for row in places[0])
    np.testing.assert_array_equal(places[0], places[1])
    assert not np.array_equal(places[0], places[2]) and not np.array_equal(places[0][0], places[0][1])


def test_it_trains_as_many_numbers_as_lora(key):
    params = jax.eval_shape(models.build(models.preset("tiny-llama")).init, key)
    counts = [tree.size(jax.eval_shape(m.init, key, params)[1]) for m in (peft.shira(rank=2), peft.lora(rank=2))]
    assert counts[0] == counts[1]


def test_a_rank_with_more_places_than_entries_is_refused(key):
    with pytest.raises(ValueError, match="expected 1 to 2"):
        peft.shira(["q_proj"], rank=3).init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
