"""What a run takes while it writes its own samples, as the plan has it, is what the engine makes and what the compiler says."""

import pathlib
from functools import partial

import jax
import numpy as np
import pytest

from ftjax import models, rollout, tree
from ftjax.cli import abstract, build, footprint, footprint_sampling, knobs, main, rollouts, topology
from ftjax.cli import config as configs
from ftjax.rollout import slots as programs
from ftjax.rollout.requests import form_of

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(**fields):
    config = configs.load(f"{CONFIGS}/grpo_smollm2_sums.py:smoke").unlock()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return build.resolved(config)


def found_of(config, kind="cpu"):
    return footprint.of(config, build.mesh(config), kind)


def emptied(config, built):
    """The parameters of a policy, of zeros, and the engine's slots."""
    request = rollout.Request(np.array([1]), 1, sampling=rollouts.sampling(config), key=jax.random.key(0))
    settings = form_of([request], (2,)).settings([], footprint_sampling.slots(config))
    frozen, trainable = (jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), part) for part in (built.frozen, built.state.trainable))
    params = jax.device_put(built.method.attach(frozen, trainable))
    apart = models.separable(built.model, params)
    return params, programs.empty(built.model, params, settings, num_columns=config.data.max_tokens, layers_apart=apart)


@pytest.mark.parametrize("fields", [{}, {"rollout__slots": 3}, {"methods": ("prompt_tuning",)}])
def test_keys_and_values_are_those_of_the_slots(fields):
    config = config_of(**fields)
    built = abstract.built(config, build.mesh(config))
    _, slots = emptied(config, built)
    assert found_of(config).cache == tree.num_bytes((slots.cache.k, slots.cache.v)) > 0


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("layers", "columns"), [(2, 128), (4, 1024)])
def test_a_step_of_writing_takes_what_its_shapes_say(layers, columns, dtype, apart, monkeypatch):
    """With the vocabulary of a real model, and a cache of which one layer is more than the logits: no step may copy all of it."""
    monkeypatch.setattr(models, "separable", lambda model, params: apart)
    shape = {"model__layers": tuple(range(layers)), "data__batch_size": 64, "data__max_tokens": columns}
    config = config_of(model__preset="smollm2-135m", model__dtype=dtype, **shape)
    built = abstract.built(config, build.mesh(config))
    params, slots = emptied(config, built)
    written = models.apart(params) if apart else params
    leaves, structure = jax.tree.flatten(slots)

    def write(params, leaves):
        return programs.write(built.model, params, structure.unflatten(leaves), 0, None, impl="threefry2x32", num_tokens=16)

    compiled = jax.jit(write, donate_argnums=1).lower(written, leaves).compile().memory_analysis()
    read = tree.num_bytes(jax.eval_shape(partial(models.init_cache, built.model.config, 1, max(512, columns), dtype)))
    laid = models.turned_bytes(params) if apart else 0
    assert found_of(config).writing - read - laid == pytest.approx(compiled.temp_size_in_bytes, rel=0.15)


def test_a_mesh_splits_the_cache_over_rows_and_heads():
    whole, split = (found_of(config_of(mesh__data=1, **fields)) for fields in ({}, {"mesh__fsdp": 2, "mesh__tensor": 2}))
    assert split.cache == whole.cache // 4


def test_who_samples_ahead_does_so_beside_the_steps_with_weights_of_its_own():
    between, ahead = found_of(config_of()), found_of(config_of(rollout__staleness=2, loss__correction="token_truncate"))
    assert ahead.past == 2 * between.gradients and between.past == 0 and ahead.held - between.held == ahead.past
    alone, beside = ahead._replace(ahead=False).moments, ahead.cache + ahead.writing
    assert ahead.moments == {name: size + (beside if name != "sampling" else 0) for name, size in alone.items()}
    assert between.moments["sampling"] == alone["sampling"] == beside > 0


def test_a_plan_counts_the_moment_of_sampling(capsys):
    given = [f"--config={CONFIGS}/grpo_smollm2_sums.py:smoke", "--compile_cache=off", "--compile=False"]
    assert main.main(["plan", *given, "--config.data.batch_size=64", "--config.data.accumulation=64"]) == 0
    out = capsys.readouterr().out
    assert "where it is fullest: while it samples" in out and "keys and values of the slots" in out and "models that judge" in out


def test_fewer_slots_are_a_knob():
    config = config_of(data__batch_size=64, data__accumulation=64)
    here = topology.find("here")
    fewer = [one for one in knobs.tried(config, here._replace(devices=here.devices[:1]), budget=1) if set(one.change) == {"rollout.slots"}]
    assert [one.flags for one in fewer] == ["--config.rollout.slots=4"] and fewer[0].footprint.cache == found_of(config).cache // 16


def test_a_run_that_samples_nothing_has_no_such_moment():
    config = configs.load(f"{CONFIGS}/quickstart.py:smoke")
    assert set(footprint.of(config, build.mesh(config), "cpu").moments) == {"forward", "backward", "update"}
