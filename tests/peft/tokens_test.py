import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft
from ftjax.peft.tokens import TokensWeight
from tests import toy
from tests.peft import formula


def test_rows_are_replaced_wherever_the_embedding_is_read(key):
    ids = (0, 3, 6)

    def dense(base, rows):
        out = base.copy()
        out[list(ids)] = rows
        return out

    w = TokensWeight(formula.normal(key, 7, 5), formula.normal(jax.random.key(1), 3, 5), ids)
    want = dense(formula.double(w.base), formula.double(w.rows))
    tokens, x, g = jnp.array([[0, 1, 2, 3], [4, 5, 6, 6]]), formula.normal(key, 2, 5), formula.normal(key, 2, 4, 5)
    formula.close(w.materialize(), want)
    formula.close(w.embed(tokens), want[np.asarray(tokens)])
    formula.close(w.dot_transposed(x), formula.double(x) @ want.T)
    gradient = jax.grad(lambda rows: jnp.sum(g * TokensWeight(w.base, rows, ids).embed(tokens)))(w.rows)
    formula.close(gradient, np.stack([g[0, 0], g[0, 3], g[1, 2] + g[1, 3]]))
    h = formula.normal(key, 2, 7)
    gradient = jax.grad(lambda rows: jnp.sum(h * TokensWeight(w.base, rows, ids).dot_transposed(x)))(w.rows)
    formula.close(gradient, formula.double(h).T[list(ids)] @ formula.double(x))


def test_other_rows_stay_bit_for_bit(key):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(key))
    method = peft.tokens([5, 2])
    frozen, trainable = method.init(key, params)
    moved = peft.merge(method, frozen, jax.tree.map(lambda x: x + 1.0, trainable))["embed_tokens"]["kernel"]
    same = [np.array_equal(*rows) for rows in zip(moved, params["embed_tokens"]["kernel"], strict=True)]
    assert [n for n, equal in enumerate(same) if not equal] == [2, 5]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ids": [3, 3]}, "each once"),
        ({"ids": []}, "at least one"),
        ({"ids": [toy.VOCAB]}, "expected 0 to 16"),
        ({"ids": [1], "targets": "mlp"}, "not an embedding"),
    ],
)
def test_bad_options_say_what_was_expected(key, options, message):
    with pytest.raises(ValueError, match=message):
        peft.tokens(**options).init(key, toy.init(key))
