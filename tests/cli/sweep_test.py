"""A sweep on the command line: each member as if alone, the best exported, and on from where it stopped, bit for bit."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax.checkpoint import Checkpoints
from ftjax.cli import build, main, measure
from ftjax.cli import config as configs
from ftjax.cli.stop import Stop
from ftjax.hf import export as hf_export
from ftjax.logs.writers import read_jsonl
from tests.cli.conftest import CONFIG
from tests.cli.train_test import assert_bitwise_equal, stored

SWEEP = "optimizer.learning_rate=1e-3,1e-2 lora.rank=2; lora.rank=4 lora.alpha=4 seed=0,1"
HELD_OUT = ("--config.eval.every_steps=3", "--config.logging.every_steps=2")


@pytest.fixture(scope="module")
def swept(arguments, tmp_path_factory):
    """The workdir of a sweep of four members that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("swept")
    assert main.main(arguments(workdir, *HELD_OUT, f"--sweep={SWEEP}")) == 0
    return workdir


def test_each_member_reports_what_its_run_alone_does_and_the_best_is_exported_as_that(swept, arguments, tmp_path):
    result = json.loads((swept / "sweep.json").read_text())
    best = result["members"][result["best"]]
    assert best["best"] == min(member["best"] for member in result["members"]) and best["ended"] == "finished" and best["steps"] == 6
    assert best["options"] == {"optimizer.learning_rate": 0.01, "lora.rank": 2}
    alone = [f"--config.{name}={value}" for name, value in best["options"].items()]
    assert main.main(arguments(tmp_path, *HELD_OUT, *alone)) == 0
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/loss" in row or "eval/loss" in row}
    found = {row["step"]: row for row in read_jsonl(swept / "metrics.jsonl") if "train/loss/1" in row or "eval/loss/1" in row}
    names = [name for name in rows[6] if name.startswith("eval/")]
    assert len(names) > 3 and best["best_step"] == 6
    for name in names:
        assert found[6][f"{name}/1"] == pytest.approx(rows[6][name], rel=1e-5)
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/supervised_tokens"):
        assert [found[step][f"{name}/1"] for step in (2, 4)] == pytest.approx([rows[step][name] for step in (2, 4)], rel=1e-5)
    exported, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (swept, tmp_path))
    assert exported.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(exported[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)
    texts = [json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (swept, tmp_path)]
    assert texts[0] == texts[1] and texts[0]["r"] == 2
    assert (swept / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("at", [2, 5])
def test_a_stopped_sweep_goes_on_bit_for_bit(at, swept, arguments, tmp_path, monkeypatch, capsys):
    command = arguments(tmp_path, *HELD_OUT, f"--sweep={SWEEP}")
    with monkeypatch.context() as patch:

        def stop(self, step):
            self.reason = "SIGTERM" if step == at else None
            return step == at

        patch.setattr(Stop, "at", stop)
        assert main.main(command) == 0
    assert f"saved at step {at} of 6" in capsys.readouterr().out and not (tmp_path / "sweep.json").exists()
    assert main.main(command) == 0
    assert f"going on from step {at}" in capsys.readouterr().out
    assert_bitwise_equal(stored(tmp_path), stored(swept))
    assert (tmp_path / "sweep.json").read_text() == (swept / "sweep.json").read_text()
    lines = [
        [{name: value for name, value in row.items() if name.split("/")[-1].isdigit()} for row in read_jsonl(folder / "metrics.jsonl")]
        for folder in (tmp_path, swept)
    ]
    assert [row for row in lines[0] if row] == [row for row in lines[1] if row]


def test_each_member_ends_early_for_itself_with_its_best_weights(arguments, tmp_path, capsys, monkeypatch):
    results = iter([(3.0, 3.0), (2.0, 4.0), (2.5, 1.0), (2.6, 1.0)])  # the second member ends at step 2 and its 1.0 do not count
    monkeypatch.setattr(measure, "evaluate_each", lambda step, batches, count: [{"loss": loss} for loss in next(results)])
    command = arguments(tmp_path, "--config.eval.every_steps=1", "--config.checkpoint.every_steps=1", "--config.checkpoint.keep=9")
    command += ["--config.early_stopping.patience=1", "--config.logging.every_steps=1", "--sweep=optimizer.learning_rate=1e-3,2e-3"]
    assert main.main(command) == 0
    out = capsys.readouterr().out
    assert "early stopping after" in out and "what follows is of member 0 (learning_rate 0.001) at step 2" in out
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert [(member["best"], member["best_step"], member["steps"]) for member in result["members"]] == [(2.0, 2, 3), (3.0, 1, 2)]
    steps = {step: stored(tmp_path, step) for step in Checkpoints(tmp_path / "checkpoints").steps()}
    assert sorted(steps) == [1, 2, 3]
    last = {path: array for path, array in steps[3].items() if "last" in path}
    assert any((array[0] != steps[2][path][0]).any() for path, array in last.items())
    assert all((array[1] == steps[2][path][1]).all() for path, array in last.items())
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    best = [array[0] for path, array in steps[3].items() if "best" in path]
    assert norm(exported.values()) == pytest.approx(norm(best), rel=1e-6)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/loss/1" in row] == [1, 2]


def norm(arrays) -> float:
    return sum(float(np.abs(array.astype(np.float64)).sum()) for array in arrays)


def test_a_member_that_is_lost_ends_and_the_others_go_on(arguments, tmp_path, capsys):
    more = ["--config.eval.every_steps=2", "--config.max_skipped_steps=2", "--sweep=optimizer.learning_rate=1e-3,1e30"]
    assert main.main(arguments(tmp_path, *more)) == 0
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert result["best"] == 0 and [member["ended"] for member in result["members"]] == ["finished", "not finite"]
    assert result["members"][1]["skipped"] == 2 and "not finite at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sweep=data.batch_size=2,4"], "What can be swept here"),
        (["--sweep=seed=0,1", "--config.eval.every_steps=0"], "compared on held-out data"),
        (["--sweep=lora.rank=4,400"], "rank 400"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_by_name(more, message, arguments, tmp_path, capsys):
    assert main.main(arguments(tmp_path, *HELD_OUT, *more)) == 1
    assert message in capsys.readouterr().err


def test_another_sweep_in_the_same_workdir_is_refused(swept, arguments, capsys):
    assert main.main(arguments(swept, *HELD_OUT, "--sweep=seed=0,1")) == 1
    assert "sweep:" in capsys.readouterr().err


def test_a_sweep_exports_its_best_member_whole(swept, tmp_path, capsys):
    config = configs.load(CONFIG)
    base = build.model(config, build.mesh(config))
    hf_export.export_model(tmp_path / "base", base.model, base.params, base.tokenizer)
    assert main.main(["export", f"--workdir={swept}", f"--output={tmp_path / 'swept'}"]) == 0
    assert "member 1 (learning_rate 0.01, rank 2) at step 6" in capsys.readouterr().out
    assert main.main(["merge", f"--model={tmp_path / 'base'}", f"--adapter={swept / 'adapter'}", f"--output={tmp_path / 'merged'}"]) == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("swept", "merged"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    assert main.main(["export", f"--workdir={swept}", "--step=3", f"--output={tmp_path / 'no'}"]) == 1


def test_a_sweep_over_split_weights_equals_one_device(swept, arguments, tmp_path):
    assert main.main(arguments(tmp_path, *HELD_OUT, "--config.mesh.fsdp=2", f"--sweep={SWEEP}")) == 0
    found, expected = (json.loads((folder / "sweep.json").read_text()) for folder in (tmp_path, swept))
    assert [one["best"] for one in found["members"]] == pytest.approx([one["best"] for one in expected["members"]], rel=1e-5)
    assert [one["train_loss"] for one in found["members"]] == pytest.approx([one["train_loss"] for one in expected["members"]], rel=1e-5)
