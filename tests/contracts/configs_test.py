"""Every config in configs/: locked, built abstractly at its full size, and run for a few steps with a tiny model of its family."""

import ast
import json
import pathlib
from functools import partial

import jax
import pytest

from ftjax import sharding, tree
from ftjax.cli import build, main
from ftjax.cli import config as configs
from ftjax.logs.writers import read_jsonl
from ftjax.train import init_state

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "base")

pytestmark = pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")


def spec(name: str, arg: str = "") -> str:
    return str(FOLDER / f"{name}.py") + (f":{arg}" if arg else "")


def test_there_are_configs():
    assert len(NAMES) >= 8


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
def test_a_config_is_built_at_its_full_size_without_an_array(name):
    config = configs.load(spec(name))
    model, _ = build.architecture(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    method, optimizer = build.method(config), build.optimizer(config)
    build.loss(config)
    frozen, trainable = jax.eval_shape(method.init, jax.random.key(0), params)
    assert any(row.method in trainable for row in method.plan(params))
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), jax.random.key(0), trainable)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    sharding.shardings(frozen, mesh)
    everywhere = sharding.state_shardings(state, mesh)
    assert len(jax.tree.leaves(everywhere.trainable)) == len(jax.tree.leaves(state.trainable))
    assert 0 < tree.size(trainable)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_smokes_through_the_command_line(name, tmp_path, capsys):
    assert (
        main.main(
            ["train", f"--config={spec(name, 'smoke')}", f"--workdir={tmp_path / 'run'}", f"--compile_cache={tmp_path.parent / 'cache'}"]
        )
        == 0
    )
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "What is trained" in out and "step 4/4" in out
    trains_adapter = "lora" in configs.load(spec(name)).methods
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists() == trains_adapter
    assert ("(PEFT format)" in out) == trains_adapter and "try it" not in out and "to use it" not in out
