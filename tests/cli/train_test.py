"""A run that was stopped, killed or refused goes on as if nothing had been, bit for bit."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from ftjax.checkpoint import Checkpoints
from ftjax.cli import loop, main, measure, train
from ftjax.cli.stop import Stop
from ftjax.logs.writers import read_jsonl
from ftjax.types import Mean

ROOT = pathlib.Path(__file__).parents[2]


def stored(workdir, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, the last one if None, as they are on the disk."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.steps()[-1] if step is None else step
    checkpoints.verify(step)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(workdir / "checkpoints" / f"{step:08d}" / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]}


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    for path in a:
        assert a[path].tobytes() == b[path].tobytes(), path


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The workdir of a run of six steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert main.main(arguments(workdir)) == 0
    return workdir


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(at, whole, arguments, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:

        def stop(self, step):
            self.reason = "SIGTERM" if step == at else None
            return step == at

        patch.setattr(Stop, "at", stop)
        assert main.main(arguments(tmp_path)) == 0
    assert f"saved at step {at} of 6" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == at
    assert main.main(arguments(tmp_path)) == 0
    assert f"going on from step {at}" in capsys.readouterr().out
    assert_bitwise_equal(stored(tmp_path), stored(whole))
    lines = [(row["step"], row["train/loss"]) for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert lines == [(row["step"], row["train/loss"]) for row in read_jsonl(whole / "metrics.jsonl") if "train/loss" in row]


def test_the_weights_do_move(whole):
    moved = stored(whole)
    assert any("'b'" in path and np.abs(array).max() > 0 for path, array in moved.items() if "trainable" in path)


def test_a_finished_run_that_gets_more_steps_goes_on(whole, arguments, tmp_path):
    assert main.main(arguments(tmp_path, "--config.steps=4")) == 0
    assert main.main(arguments(tmp_path)) == 0  # the schedule is constant: its length changes no step
    assert_bitwise_equal(stored(tmp_path), stored(whole))


def test_another_config_in_the_same_workdir_is_refused(whole, arguments, capsys):
    assert main.main(arguments(whole, "--config.lora.rank=2", "--config.optimizer.learning_rate=0.5")) == 1
    err = capsys.readouterr().err
    assert "lora.rank: 4 -> 2" in err and "optimizer.learning_rate" in err and "--allow_config_change" in err


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(arguments, tmp_path, capsys):
    assert main.main(arguments(tmp_path, "--config.steps=2")) == 0
    files = [path for path in (tmp_path / "checkpoints" / "00000002" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(bytes(data))
    assert main.main(arguments(tmp_path)) == 1
    assert largest.name in capsys.readouterr().err


def test_a_damaged_record_stops_the_run_or_is_gone_back_before(arguments, tmp_path, capsys):
    assert main.main(arguments(tmp_path, "--config.steps=3", "--config.checkpoint.every_steps=2")) == 0
    record = tmp_path / "checkpoints" / "00000003" / "record.json"
    record.write_text(record.read_text().replace('"rank": 4', '"rank": 5'))
    capsys.readouterr()
    assert main.main(arguments(tmp_path)) == 1
    err = capsys.readouterr().err
    assert f"{record} was changed" in err and "--config.checkpoint.fall_back" in err
    assert main.main(arguments(tmp_path, "--config.checkpoint.fall_back=True")) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 6 and record.parent.with_name("00000003.damaged").is_dir()


def test_steps_that_are_not_finite_change_nothing_and_end_the_run_by_name(arguments, tmp_path, capsys):
    more = ["--config.methods=lora", "--config.methods=neftune", "--config.neftune.alpha=inf", "--config.max_skipped_steps=3"]
    assert main.main(arguments(tmp_path, *more)) == 1
    out, err = capsys.readouterr()
    assert "step 1 was skipped" in out and "3 steps in a row, the last of them step 3" in err and "learning_rate" in err
    saved = stored(tmp_path)
    assert int(saved["['step']"]) == 3
    assert all(np.abs(array).max() == 0 for path, array in saved.items() if "trainable" in path and path.endswith("['b']"))


def test_a_run_that_gets_no_better_ends_early_with_its_best_weights(arguments, tmp_path, capsys, monkeypatch):
    losses = iter((1.0, 2.0))
    monkeypatch.setattr(measure, "evaluate", lambda step, batches: {"loss": next(losses)})
    command = arguments(tmp_path, "--config.eval.every_steps=-1", "--config.early_stopping.patience=1", "--config.steps=20")
    assert main.main(command) == 0
    assert "early stopping after step 8: what follows is of step 4" in capsys.readouterr().out
    # Four steps are an epoch: -1 evaluates after each.
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "eval/loss" in row] == [4, 8]
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    norms = {step: norm(array for path, array in stored(tmp_path, step).items() if "trainable" in path) for step in (4, 8)}
    assert norm(exported.values()) == pytest.approx(norms[4], rel=1e-6) != pytest.approx(norms[8], rel=1e-6)
    assert main.main(command) == 0  # it has ended: nothing is trained, and the losses are used up
    assert "what follows is of step 4" in capsys.readouterr().out


def norm(arrays) -> float:
    return sum(float(np.abs(array.astype(np.float64)).sum()) for array in arrays)


def test_a_signal_after_the_last_step_does_not_take_the_result_away(whole, arguments, capsys, monkeypatch):
    def signalled(loop, state, *, start):
        ended = take_steps(loop, state, start=start)
        loop.stop.reason = "SIGTERM"
        return ended

    take_steps = train.take_steps
    monkeypatch.setattr(train, "take_steps", signalled)
    assert main.main(arguments(whole)) == 0
    out = capsys.readouterr().out
    assert "goes on from there" not in out and "finished after" in out and "adapter" in out


def start(arguments) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "ftjax", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@contextlib.contextmanager
def killed_at_last(process):
    try:
        yield
    finally:
        process.kill()


def wait_for(found, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_real_signals_leave_a_run_that_can_go_on(arguments, tmp_path, capsys):
    endless = arguments(tmp_path, "--config.steps=1000000")
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    with start(endless) as process, killed_at_last(process):
        wait_for(lambda: len(read_jsonl(tmp_path / "metrics.jsonl")) > 2, process)
        assert main.main(endless) == 1  # while the first one runs
        assert f"in use by process {process.pid}" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
        process.wait(timeout=60)
    stopped_at = checkpoints.steps()[-1]
    assert process.returncode == 0 and f"saved at step {stopped_at} of 1000000" in out

    with start(endless) as process, killed_at_last(process):
        wait_for(lambda: checkpoints.steps()[-1] > stopped_at, process)
    killed_at = checkpoints.steps()[-1]
    checkpoints.verify(killed_at)
    assert main.main(arguments(tmp_path, f"--config.steps={killed_at + 1}")) == 0
    assert f"going on from step {killed_at}" in capsys.readouterr().out


def test_a_second_ctrl_c_aborts_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.at(1) and stop.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("late", [True, False])
def test_metrics_are_read_late_or_at_once_and_each_step_once(late):
    written = []
    log = SimpleNamespace(
        write=lambda step, values: written.append((step, values.get("train/loss"))),
        add=lambda tokens, flops: None,
        read=lambda: {"tokens_per_second": 1.0, "mfu": 0.1, "memory_gb": 1.0},
        advance=lambda step: None,
        report=lambda step, values: None,
        say=lambda text: None,
    )
    config = ConfigDict({"algorithm": "sft", "logging": {"every_steps": 2}, "steps": 4, "max_skipped_steps": 3})
    unused = dict.fromkeys(field.name for field in dataclasses.fields(loop.Loop))
    given = {"config": config, "flops": lambda batch: 1.0, "parts": 1, "learning_rate": lambda step: 0.5, "memory": loop.Memory()}
    readings = loop.Readings(loop.Loop(**{**unused, **given, "writers": log, "terminal": log, "meter": log}), late=late)
    batch = SimpleNamespace(segment_ids=np.ones((1, 4)))

    seen = []
    for step in (1, 2, 3, 4):
        one = Mean(np.float32(step), np.float32(1))
        readings.add(step, {"loss": one, "grad_norm": one, "tokens": one, "skipped": Mean(np.float32(0), np.float32(1))}, batch)
        seen.append(len(written))
    readings.flush()
    assert seen == ([0, 1, 2, 2] if late else [1, 2, 2, 3])
    assert written == [(1, None), (2, 1.5), (4, 3.5)]
