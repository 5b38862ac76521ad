"""What a run starts from: its method, and the two trees, after a look at the first batches where LoRA's start wants one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from ftjax import peft, quant, sharding, tree
from ftjax.cli import build, objective
from ftjax.peft import calibration, inits
from ftjax.types import Batch, Params, Transform


def method(config, loaded: build.Loaded, mesh: Mesh) -> tuple[Transform, Params, Params]:
    """Return the method of a config with the trees `frozen` and `trainable` before the first step: the same whenever it is asked."""
    found, key = statistics(config, loaded, mesh), jax.random.fold_in(jax.random.key(config.seed), 0)

    def init(key: jax.Array, params: Params, found: Params) -> tuple[Params, Params]:
        return build.method(config, found).init(key, params)

    frozen, trainable = sharding.init_on_mesh(init, key, loaded.params, found, mesh=mesh)
    quant.check_finite("model", tree.flatten(frozen))  # LoftQ's, that nobody saw while they were traced
    return build.method(config, jax.eval_shape(lambda found: found, found)), frozen, trainable


def statistics(config, loaded: build.Loaded, mesh: Mesh) -> dict[str, dict[str, jax.Array]]:
    """Return `{method: {path: array}}` for the methods of a config whose `init` is among `inits.CALIBRATED`; mostly there are none.

    The batches are the first `config.calibration.batches` of the training, or of other sources, as the seed orders them. The same config on
    the same devices gives the same bits, so a run that is resumed starts from what it started from.
    """
    asked = {name: options for name, options in build.methods(config) if options.get("init") in inits.CALIBRATED}
    if not asked:
        return {}
    read = objective.reading(config, loaded.model, mesh)

    def loss(params: Params, batch: Batch) -> jax.Array:
        mean, _ = read(params, jax.lax.stop_gradient(params), batch)
        return mean.total / mean.weight

    found = {}
    for name, options in asked.items():
        build.calibrated(config, options["init"], {})  # wrong options should not have to wait for the batches
        paths = {path for row in peft.METHODS[name](**options).plan(loaded.params) for path in row.paths}
        look = calibration.weight_gradients if options["init"] == "lora_ga" else calibration.input_moments
        total = look(loss, loaded.params, _batches(config, loaded, mesh), targets=paths.__contains__)
        found[name] = jax.tree.map(lambda x: x / (config.calibration.batches * config.data.accumulation), total)
    return found


def _batches(config, loaded: build.Loaded, mesh: Mesh) -> Iterator[Any]:
    """Yield the micro-batches of the first batches."""
    if config.calibration.batches < 1:
        raise ValueError(f"calibration.batches: at least 1, not {config.calibration.batches}.")
    if config.calibration.get("sources"):  # configs of older runs have no such field
        sources = config.calibration.sources
        with config.copy_and_resolve_references().unlocked() as config:
            config.data.sources = sources
    loader, _ = build.loader(config, build.encoder(config, loaded.tokenizer), mesh)
    parts = config.data.accumulation
    for step in range(config.calibration.batches):
        batch = loader.batch(step)
        for part in range(parts):
            yield build.on_mesh(jax.tree.map(lambda rows, part=part: rows[part::parts], batch), mesh)
