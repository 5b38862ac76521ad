import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree
from ftjax.peft.miss import BatWeight, MissWeight
from tests.peft import formula


@pytest.mark.parametrize("rank, columns", [(1, 6), (3, 6), (4, 6), (7, 6), (3, 2), (4, 1)])
def test_a_block_repeats_along_the_input(key, rank, columns):
    def dense(base, block):
        return base + np.array([[block[n % rank, m % columns] for m in range(6)] for n in range(7)])

    formula.check(MissWeight, dense, {"block": formula.normal(key, rank, columns)}, i=7, o=6, key=key)


def test_bat_turns_each_block_and_adds(key):
    def dense(base, blocks):
        out = base.copy()
        for n in range(2):
            for m in range(3):
                here = np.s_[2 * n : 2 * n + 2, 2 * m : 2 * m + 2]
                out[here] = base[here] + blocks[m] @ base[here] + blocks[m]
        return out

    formula.check(BatWeight, dense, {"blocks": formula.normal(key, 3, 2, 2)}, i=4, o=6, key=key)


@pytest.mark.parametrize("options, numbers", [({}, 64 * 1024), ({"form": "mini", "mini_rank": 8}, 64 * 8), ({"form": "bat"}, 64 * 1024)])
def test_it_trains_what_the_paper_counts(key, options, numbers):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    assert tree.size(jax.eval_shape(peft.miss(["k_proj"], rank=64, **options).init, key, params)[1]) == 32 * numbers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 5}, "expected 1 to 4"),
        ({"rank": 3, "form": "bat"}, "divides both sides"),
        ({"rank": 2, "form": "mini", "mini_rank": 4}, "does not divide the 6 columns"),
        ({"form": "bats"}, "nearest: 'bat'"),
    ],
)
def test_bad_options_say_what_was_expected(key, options, message):
    with pytest.raises(ValueError, match=message):
        peft.miss(["q_proj"], **options).init(key, {"q_proj": {"kernel": jnp.zeros((4, 6))}})
