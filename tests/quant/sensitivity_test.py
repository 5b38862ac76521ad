"""The report finds what a format hurts, by numbers and by loss; the rule keeps the worst of it within a share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, quant, scoring, tree, weights
from ftjax.quant import sensitivity
from ftjax.quant.sensitivity import Row
from tests import toy

UP, DOWN = "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"
ROWS = [Row("a", 100, (0.1,), 2.0), Row("b", 10, (0.1, 0.3), 0.5), Row("c", 10, (0.1,), 0.3), Row("d", 10, (0.9,), -0.1)]


@pytest.fixture(scope="module")
def found():
    """The toy with outliers in one layer of one kind, its loss, and the report."""
    params, batch = toy.init(jax.random.key(0)), toy.batch(jax.random.key(1))
    params["layers"]["mlp"]["up_proj"]["kernel"] = params["layers"]["mlp"]["up_proj"]["kernel"].at[1, 3].multiply(9)
    loss = lambda params, batch: losses.sft(scoring.score(toy.MODEL, params, batch), batch)[0]  # noqa: E731
    return params, partial(loss, batch=batch), sensitivity.report(params, "int4", group=8, loss=loss, batches=[batch, batch])


def test_errors_are_those_of_every_layer(found):
    params, _, rows = found
    for row in rows:
        w = np.asarray(tree.flatten(params)[row.path], np.float64)
        off = np.asarray(quant.quantize(jnp.asarray(w, jnp.float32), "int4", group=8).materialize()) - w
        np.testing.assert_allclose(row.errors, np.sqrt((off**2).sum((1, 2)) / (w**2).sum((1, 2))), rtol=1e-5)
    assert np.argmax({row.path: row.errors for row in rows}[UP]) == 1  # where the outliers are


def test_the_rise_of_the_loss_is_that_of_one_kind_alone(found):
    params, loss, rows = found
    assert {row.path for row in rows} == {UP, DOWN} and [row.harm for row in rows] == sorted((row.harm for row in rows), reverse=True)
    packed = quant.int4(UP, group=8).init(jax.random.key(0), params)[0]
    rise = loss(packed).value() - loss(params).value()
    assert {row.path: row.rise for row in rows}[UP] == pytest.approx(rise, rel=1e-3, abs=1e-6) and abs(rise) > 1e-4


def test_the_worst_in_more_bits_is_a_chain_of_two_formats_and_a_smaller_error(found):
    params, _, rows = found
    worst = sensitivity.worst([row._replace(rise=None) for row in rows], share=0.5)
    frozen, _ = peft.chain(quant.int4(group=8, exclude=worst), quant.int8(worst)).init(jax.random.key(0), params)
    formats = {path: leaf.format for path, leaf in tree.flatten(frozen).items() if isinstance(leaf, quant.QuantizedWeight)}
    assert formats == {UP: "int8", DOWN: "int4"}
    errors = sensitivity.relative_errors(tree.flatten(params)[UP], weights.materialize(tree.flatten(frozen)[UP]))
    assert max(errors) < 0.2 * {row.path: row for row in rows}[UP].error


def test_kinds_are_taken_by_harm_for_their_size_while_they_fit():
    assert sensitivity.worst(ROWS, share=0.2) == "b|c"
    assert sensitivity.worst(ROWS, share=0.1) == "b"
    assert sensitivity.worst(ROWS, share=0.99) == "b|c|a"  # never d, whose loss falls
    assert sensitivity.worst([row._replace(rise=None) for row in ROWS], share=0.16) == "d|b"
    with pytest.raises(ValueError, match="no kind that is harmed fits into 0.05 of the numbers; the smallest has 0.0769"):
        sensitivity.worst(ROWS, share=0.05)


def test_a_loss_needs_batches_a_group_must_divide_and_zeros_have_no_error():
    with pytest.raises(ValueError, match="'layers/mlp/down_proj/kernel': quant: 16 rows .* groups of 64"):
        sensitivity.report(toy.init(jax.random.key(0)), "int4")
    with pytest.raises(ValueError, match="a loss and no batch"):
        sensitivity.report(toy.init(jax.random.key(0)), "int4", group=8, loss=lambda params, batch: None)
    np.testing.assert_array_equal(sensitivity.relative_errors(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4))), [0, 0])
