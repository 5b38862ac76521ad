"""What an objective asks of a config beside its data."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.cli import abstract, build, knobs, main, objective, topology
from ftjax.cli import config as configs
from ftjax.types import Batch

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "dpo_smollm2_hh.py") + ":smoke"


def config(algorithm, accumulation, **options):
    found = configs.load(CONFIG)
    with found.unlocked():
        found.algorithm, found.loss, found.data.accumulation = algorithm, options, accumulation
    return found


COMPARED = [("aot", {}), ("aot_unpaired", {}), ("dpo", {"losses": {"sigmoid": 0.5, "aot": 0.5}})]


@pytest.mark.parametrize(("name", "options"), COMPARED)
def test_rows_that_are_compared_with_each_other_are_in_one_micro_batch(name, options):
    with pytest.raises(ValueError, match=f"data.accumulation: '{name}' compares all rows of a step .* 2 micro-batches .* set it to 1"):
        objective.check_batch(config(name, 2, **options))
    objective.check_batch(config(name, 1, **options))
    objective.check_batch(config("mpo", 2))


@pytest.mark.parametrize(("name", "offered"), [("aot", False), ("dpo", True)])
def test_a_plan_offers_micro_batches_where_they_are_as_good(name, offered):
    ladders = knobs._ladders(config(name, 1), topology.find("here"))
    assert any("data.accumulation" in change for ladder in ladders for change in ladder) == offered


def test_a_run_is_refused_before_anything_is_loaded(tmp_path, capsys):
    flags = ["--config.algorithm=aot", "--config.data.accumulation=2", "--config.model.name=nowhere"]
    assert main.main(["train", f"--config={CONFIG}", f"--workdir={tmp_path}/run", *flags]) != 0
    assert "data.accumulation: 'aot' compares all rows" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("name", ["npo", "gradient_difference"])
def test_every_micro_batch_knows_the_share_of_rows_to_keep(name, packing):
    """Of four responses the last is to be kept; written before the gradient, whether they are packed or not."""
    found = config(name, 1)
    found.data.packing = packing
    step = abstract.built(found, build.mesh(found))
    _, metrics = jax.eval_shape(step.train_step, step.state, step.frozen, step.batch)
    assert "loss" in metrics
    share = objective.comparison(found, *build.architecture(found)[:1], build.mesh(found))["baseline"]
    ints = jnp.zeros((4, 3), jnp.int32)
    rows = Batch(ints, jnp.ones((4, 3)), ints, ints + 1, desirable=jnp.array([0.0, 0.0, 0.0, 1.0]))
    if packing != "none":
        flat = {field: getattr(rows, field).reshape(1, 12) for field in ("tokens", "loss_mask", "positions", "segment_ids")}
        rows = Batch(**flat, desirable=rows.desirable[None], places=jnp.arange(12).reshape(1, 4, 1, 3))
    written = share.write(rows, share.measure({}, {}, rows))
    np.testing.assert_allclose(written.desirable_share, np.full(rows.desirable.shape, 0.25))
    assert "baseline" not in objective.comparison(config("orpo", 1), None, None)


@pytest.mark.parametrize("name", ["bco", "bco_balanced"])
def test_what_was_seen_of_the_rewards_is_in_the_state(name):
    found = config(name, 2)
    step = abstract.built(found, build.mesh(found))
    state, metrics = jax.eval_shape(step.train_step, step.state, step.frozen, step.batch)
    assert tuple(state.carried["rewards"]) == losses.NEEDS[name].running and {"delta", *losses.NEEDS[name].running} <= set(metrics)
