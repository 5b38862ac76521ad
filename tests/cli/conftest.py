"""What the tests of the command line share: short runs of a tiny model, compiled once."""

import pathlib
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ftjax import models
from ftjax.cli import rollouts
from ftjax.hf import export
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.types import Model, Params

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"
SHORT = (
    "--config.steps=6",
    "--config.data.accumulation=2",
    "--config.data.sources.tasks.split=train[:14]",  # four steps an epoch
    "--config.lora.dropout=0.1",
    "--config.optimizer.schedule=constant",
    "--config.eval.every_steps=0",
    "--config.eval.generate.examples=0",
    "--config.logging.tensorboard=False",
    "--config.logging.every_steps=4",
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A compile cache for the session, and JAX's settings as they were after it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield tmp_path_factory.mktemp("compiled")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def arguments(compiled):
    """`arguments(workdir, *more)`: the command line of a short run."""

    def make(workdir, *more: str) -> list[str]:
        return ["train", f"--config={CONFIG}", f"--workdir={workdir}", f"--compile_cache={compiled}", *SHORT, *more]

    return make


class Base(NamedTuple):
    """A tiny random model, and the Hugging Face folder that it is in."""

    folder: pathlib.Path
    model: Model
    params: Params


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base model for the commands that load one."""
    model = models.build(models.preset("tiny-llama"))
    params = jax.jit(model.init)(jax.random.key(1))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    export.export_model(folder, model, params, byte_tokenizer())
    return Base(folder, model, params)


@pytest.fixture
def sampled(monkeypatch):
    """`sampled(change=…, scale=1, of=rollouts)`: what its sampler writes with weights so many times as large, as `change(number, it)`."""
    asked = []

    def change_by(change=lambda _, one: one, scale=1.0, of=rollouts):
        sampler = of.sampler

        def other(*arguments, **options):
            sample = sampler(*arguments, **options)

            def draw(params, prompts, keys, **options):
                asked.append(len(prompts))
                found = sample(jax.tree.map(lambda x: x * scale, params), prompts, keys, **options)
                return [change(number, one) for number, one in enumerate(found)]

            return draw

        monkeypatch.setattr(of, "sampler", other)
        return asked

    return change_by


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The workdir of a run that nothing disturbed, by the `train` of a module."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(workdir) == 0
    return workdir
