"""What an objective says that it needs is what it needs."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from ftjax import losses
from ftjax.types import Batch, Scores


def test_every_objective_says_what_it_needs():
    assert losses.NEEDS.keys() == losses.LOSSES.keys()


READ = ("messages", "pairs", "triples", "labelled", "steps", "rollouts")


@pytest.mark.parametrize("name", [name for name, needs in losses.NEEDS.items() if needs.data in READ])
def test_an_objective_runs_with_what_it_needs_and_not_without(name):
    needs = losses.NEEDS[name]
    responses = {"pairs": (2,), "triples": (3,)}.get(needs.data, ())
    row = jax.ShapeDtypeStruct((3, *responses, 5), jnp.float32)
    each = jax.ShapeDtypeStruct((3,), jnp.float32)
    given = {field: row for field in ("tokens", "loss_mask", "positions", "segment_ids")}
    given |= {"labelled": {"desirable": each}, "steps": {"labels": row}}.get(needs.data, {})
    written = {field: each if field == "desirable" else row for field in needs.fields}
    written |= {"reference_logps": row} if needs.reference else {}
    written |= {"baseline": each} if needs.baseline or needs.running else {}
    scores = Scores(**dict.fromkeys(needs.outputs, row), **({} if "logps" in needs.outputs else {"logps": row}))
    loss, _ = jax.eval_shape(losses.LOSSES[name], scores, Batch(**given, **written))
    assert loss.total.shape == ()
    for missing in written:
        with pytest.raises(ValueError, match=missing):
            jax.eval_shape(losses.LOSSES[name], scores, Batch(**given, **{field: x for field, x in written.items() if field != missing}))


def test_options_are_keywords():
    for loss in losses.LOSSES.values():
        kinds = {parameter.kind for parameter in list(inspect.signature(loss).parameters.values())[2:]}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
