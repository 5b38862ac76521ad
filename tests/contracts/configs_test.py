"""Every config in configs/: locked, its steps traced at their full size, and run for a few steps with a tiny model of its family."""

import ast
import inspect
import json
import pathlib

import jax
import pytest

from ftjax import tree
from ftjax.cli import abstract, build, main, rollouts
from ftjax.cli import config as configs
from ftjax.logs.writers import read_jsonl

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "base")

OWN_FORM = ("pretrain_smollm2_longlora",)
"""They train what PEFT's folders have no place for: an embedding that is the output head too."""

pytestmark = pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")


def spec(name: str, arg: str = "") -> str:
    return str(FOLDER / f"{name}.py") + (f":{arg}" if arg else "")


def test_there_are_configs():
    assert len(NAMES) >= 8


@pytest.mark.parametrize("name", build.METHODS)
def test_every_method_has_a_block_of_arguments_that_it_takes(name):
    config = configs.load(spec("quickstart"))
    assert set(config[name]) <= set(inspect.signature(build.METHODS[name]).parameters)
    if name != "tokens":  # which has no sensible default
        config.methods = (name,)
        assert build.method(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_a_lab_note_and_locked(name):
    note = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"Command: ftjax train --config=configs/{name}.py --workdir=runs/{name}" in note
    assert "Hardware: " in note and ("UNTESTED" in note or "Result: " in note)
    for arg in ("", "smoke"):
        config = configs.load(spec(name, arg))
        assert config.is_locked and {"steps", "seed"} <= set(config) and "every_steps" in config.checkpoint
        json.dumps(configs.as_json(config))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_traces_its_steps_at_full_size_without_an_array(name):
    config = configs.load(spec(name))
    config.mesh.update({"data": 1, "fsdp": 4, "tensor": 1, "context": 1})
    step = abstract.built(config, build.mesh(config))
    state, metrics = jax.eval_shape(step.train_step, step.state, step.frozen, step.batch)
    assert tree.size(state.trainable) > 0 and jax.tree.structure(state) == jax.tree.structure(step.state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(step.state)]
    values = jax.eval_shape(step.eval_step, step.state.trainable, step.frozen, step.batch)
    judged = {"reward"} if rollouts.used(config) else {*values, "perplexity"}
    assert {"loss", "grad_norm", "skipped"} <= set(metrics) and config.checkpoint.best_metric in judged


@pytest.mark.parametrize("name", NAMES)
def test_a_config_smokes_through_the_command_line(name, tmp_path, capsys):
    assert (
        main.main(
            ["train", f"--config={spec(name, 'smoke')}", f"--workdir={tmp_path / 'run'}", f"--compile_cache={tmp_path.parent / 'cache'}"]
        )
        == 0
    )
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    online = rollouts.used(configs.load(spec(name)))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4 and (online or all(loss > 0 for loss in losses))
    assert [row["step"] for row in rows if ("eval/reward" if online else "eval/loss") in row] == [2, 4]
    assert (tmp_path / "run" / ("reward.png" if online else "loss.png")).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "What is trained" in out and "step 4/4" in out
    assert ("in groups of" in out) == bool(configs.load(spec(name)).model.group_tokens)
    config, files = configs.load(spec(name)), {path.name for path in (tmp_path / "run").glob("adapter/*")}
    form = "lora" in config.methods and ("ftjax's own" if name in OWN_FORM else "PEFT")
    assert ("adapter_model.safetensors" in files, "ftjax_adapter.safetensors" in files) == (form == "PEFT", form == "ftjax's own")
    assert ("config.json" in files) == bool(config.model.rope.rope_type)
    assert ("format)" in out) == bool(form) and (not form or f"({form} format)" in out) and "try it" not in out and "to use it" not in out
