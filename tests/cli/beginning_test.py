"""The start of a run: the starts of LoRA that look at the data get the first batches, and the same bits whenever a run goes on."""

import pathlib

import jax
import numpy as np
import pytest

from ftjax import peft, tree
from ftjax.cli import beginning, build, main
from ftjax.cli import config as configs
from ftjax.hf import folder, load
from ftjax.hf import peft as hf_peft
from ftjax.peft import inits

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"
Q = "layers/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def loaded():
    config = configs.load(CONFIG)
    return build.model(config, build.mesh(config))


def smoke(**lora):
    config = configs.load(CONFIG)
    config.lora.update(lora)
    config.calibration.batches = 2
    return config


@pytest.mark.parametrize("init", inits.CALIBRATED)
def test_an_init_of_the_data_is_made_of_what_the_first_batches_show(init, loaded, monkeypatch):
    config = smoke(init=init, targets=["q_proj", "down_proj"])
    mesh = build.mesh(config)
    found = beginning.statistics(config, loaded, mesh)["lora"]
    monkeypatch.setattr(beginning, "statistics", lambda *_: {"lora": found})
    method, frozen, trainable = beginning.method(config, loaded, mesh)
    assert set(found) == {path for row in method.plan(loaded.params) for path in row.paths}
    here, weight = inits.at(inits.CALIBRATED[init](found), Q), tree.flatten(loaded.params)[Q]
    a, _ = here.factors(None, weight, 4) if isinstance(here, inits.FromWeight) else here(None, weight.shape, 4)
    start = tree.flatten(trainable)[f"lora/{Q}/a"]
    cosine = np.sum(a * start, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(start, axis=1)
    np.testing.assert_allclose(np.abs(cosine), 1.0, atol=1e-3)
    for path, leaf in tree.flatten(peft.merge(method, frozen, trainable)).items():
        np.testing.assert_allclose(leaf, tree.flatten(loaded.params)[path], atol=1e-5)


OPTIONS = {"corda": {"keep": "knowledge"}, "lora_ga": {"gamma": 4.0}}


@pytest.mark.parametrize("init", OPTIONS)
def test_the_options_of_an_init_of_the_data_are_those_of_the_config(init, loaded, monkeypatch):
    config, weight = smoke(init=init, targets=["q_proj"]), tree.flatten(loaded.params)[Q]
    seen = np.random.default_rng(0).standard_normal(weight.shape, np.float32)  # square
    found = {Q: seen.mT @ seen}
    monkeypatch.setattr(beginning, "statistics", lambda *_: {"lora": found})
    config.calibration[init].update(OPTIONS[init])
    _, _, trainable = beginning.method(config, loaded, build.mesh(config))
    a, b = (tree.flatten(trainable)[f"lora/{Q}/{side}"] for side in "ab")
    expected, default = (
        np.matmul(*inits.CALIBRATED[init](found, **options).at(Q).factors(None, weight, 4)) for options in (OPTIONS[init], {})
    )
    scale = config.lora.alpha / config.lora.rank if init == "corda" else 1.0  # see FromWeight.divided
    np.testing.assert_allclose(scale * a @ b, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - default).max() > 0.1 * np.abs(expected).max()


def test_wrong_options_of_an_init_name_their_field_before_the_data_is_read(loaded, monkeypatch):
    monkeypatch.setattr(build, "loader", lambda *_: pytest.fail("the data was read"))
    config = smoke(init="corda")
    config.calibration.corda.keep = "everything"
    with pytest.raises(ValueError, match=r"calibration\.corda: inits: corda keeps 'task' or 'knowledge', not 'everything'"):
        beginning.statistics(config, loaded, build.mesh(config))


def test_an_init_may_look_at_other_sources_than_the_training(loaded, monkeypatch):
    class Read(Exception):
        pass

    def loader(config, *_):
        raise Read(", ".join(config.data.sources))

    monkeypatch.setattr(build, "loader", loader)
    config = smoke(init="corda", targets=["q_proj"])
    for expected in ("tasks", "remembered"):
        with pytest.raises(Read, match=f"^{expected}$"):
            beginning.statistics(config, loaded, build.mesh(config))
        with config.unlocked():
            config.calibration.sources.remembered = config.data.sources.tasks
    assert list(config.data.sources) == ["tasks"]


def test_the_other_inits_look_at_nothing(loaded, monkeypatch):
    monkeypatch.setattr(build, "loader", lambda *_: pytest.fail("the data was read"))
    config = smoke(init="pissa")
    assert beginning.statistics(config, loaded, build.mesh(config)) == {}


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(arguments, tmp_path):
    options = ["--config.lora.init=corda", "--config.calibration.batches=1", "--config.optimizer.learning_rate=0.01"]
    assert main.main(arguments(tmp_path / "whole", *options)) == 0
    for steps in (2, 6):
        assert main.main(arguments(tmp_path / "parts", *options, f"--config.steps={steps}")) == 0
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_what_was_random_in_the_frozen_tree_is_exported_as_it_was_trained(arguments, tmp_path):
    """LoRA-FA's A lies in no checkpoint: the export must draw it as the training did."""
    options = ["--config.methods=('lora_fa',)", "--config.optimizer.learning_rate=0.1", "--config.steps=2"]
    assert main.main(arguments(tmp_path / "run", *options)) == 0
    assert main.main(["export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'model'}"]) == 0
    config = configs.load(CONFIG)
    base = build.model(config, build.mesh(config))
    adapter = hf_peft.load_adapter(tmp_path / "run" / "adapter", base.model)
    merged = peft.merge(adapter.method, adapter.join(base.params), adapter.trainable)
    exported = load.load_params(folder.read(tmp_path / "model"), base.model)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), exported, merged)


def test_a_base_that_loftq_packs_is_finite(loaded):
    config = smoke()
    config.methods = ("loftq",)
    spoiled = tree.replace(loaded.params, {Q: tree.flatten(loaded.params)[Q].at[1, 5, 3].set(np.nan)})
    with pytest.raises(ValueError, match=rf"model: '{Q}' holds numbers that are not finite, in layers \[1\]"):
        beginning.method(config, loaded._replace(params=spoiled), build.mesh(config))
