import jax
import pytest

from ftjax import models, peft, tree
from ftjax.peft.ia3 import Rescaled
from tests.peft import formula


@pytest.mark.parametrize("fields", [("inputs",), ("outputs",), ("inputs", "outputs")])
def test_every_product_and_gradient_equals_the_formula(key, fields):
    sizes = {"inputs": 6, "outputs": 5}
    arrays = {field: formula.normal(jax.random.key(n), sizes[field]) for n, field in enumerate(fields)}

    def dense(base, inputs=None, outputs=None):
        base = base if inputs is None else inputs[:, None] * base
        return base if outputs is None else base * outputs[None, :]

    formula.check(Rescaled, dense, arrays, i=6, o=5, key=key)


def test_it_trains_what_the_paper_counts(key):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    trainable = jax.eval_shape(peft.ia3().init, key, params)[1]
    assert tree.size(trainable) == 32 * (1024 + 1024 + 14336)  # layers x (d_k + d_v + d_ff)


def test_the_input_is_scaled_only_where_it_is_said(key):
    params = jax.eval_shape(models.build(models.preset("tiny-llama")).init, key)
    flat = tree.flatten(jax.eval_shape(peft.ia3("all-linear", feedforward=None).init, key, params)[1])
    assert {path.rsplit("/", 1)[1] for path in flat} == {"outputs"}
    with pytest.raises(ValueError, match="not a matrix"):
        peft.ia3("norms").init(key, params)
