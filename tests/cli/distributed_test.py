"""Several processes are one run: the same numbers, the same answers, one workdir."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from ftjax.cli import main, runtime
from ftjax.logs.writers import read_jsonl
from tests.cli.environments_test import CONFIG

ROOT = pathlib.Path(__file__).parents[2]
MORE = (
    "--config.steps=3",
    "--config.mesh.fsdp=2",
    "--config.eval.every_steps=3",
    "--config.eval.samples=1",
    "--config.logging.every_steps=1",
)


def together(command: list[str], count: int = 2, during=lambda workers: None) -> list[tuple[int, str]]:
    """Run a command as several processes of one run, and `during(workers)` beside it; return their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen(command, cwd=ROOT, env={**shared, "JAX_PROCESS_ID": str(n)}, **pipes) for n in range(count)]
    try:
        during(workers)
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, text) for worker, text in zip(workers, said, strict=True)]


@pytest.mark.slow
def test_two_processes_train_as_one(arguments, tmp_path):
    assert main.main(arguments(tmp_path / "one", *MORE)) == 0
    for code, said in together([sys.executable, "-m", "ftjax", *arguments(tmp_path / "two", *MORE, "--distributed")]):
        assert code == 0, said
    wanted, found = (rows(tmp_path / name) for name in ("one", "two"))
    assert found.keys() == wanted.keys() and {name for _, name in wanted} == {"train/loss", "eval/loss", "eval/sample"}
    for name, value in wanted.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and any(np.abs(tensor).max() > 1e-4 for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)


ONLINE = """
from configs import grpo_smollm2_sums

def get_config(arg=""):
    config = grpo_smollm2_sums.get_config("smoke").unlock()
    config.algorithm, config.steps = "reinforce_plus_plus", 6  # whitened over the samples of both
    config.rewards = {"repetition": {"ngram_tokens": 1}}
    config.rollout.update({"minibatches": 2, "samples_per_prompt": 4, "max_tokens": 16, "dynamic_rounds": 1, "kl_penalty": 0.05})
    config.data.update({"batch_size": 12, "accumulation": 1})  # six prompts an experience, three judged by each
    config.optimizer.update({"learning_rate": 0.01, "warmup_steps": 0})
    config.eval.update({"every_steps": 2, "samples": 0})
    config.eval.generate.examples, config.checkpoint.every_steps, config.logging.every_steps = 0, 0, 1
    config.logging.tensorboard = False
    config.mesh.update({"data": 1, "fsdp": 2})
    return config.lock()
"""


PLAYED = CONFIG.replace("config.mesh.data = 1", 'config.mesh.update({"data": 1, "fsdp": 2})')


@pytest.fixture
def sampled_as_one(compiled, tmp_path):
    """`sampled_as_one(config) -> rows`: of rollouts, which a run of two processes in `two` and one of one in `one` agree about."""

    def run(config: str) -> list[dict]:
        (tmp_path / "config.py").write_text(config)
        command = ["train", f"--config={tmp_path / 'config.py'}", f"--compile_cache={compiled}"]
        assert main.main([*command, f"--workdir={tmp_path / 'one'}"]) == 0
        for code, said in together([sys.executable, "-m", "ftjax", *command, f"--workdir={tmp_path / 'two'}", "--distributed"]):
            assert code == 0, said
        found, wanted = (read_jsonl(tmp_path / name / "rollouts.jsonl") for name in ("two", "one"))
        for row, same in zip(found, wanted, strict=True):
            assert row.pop("advantage") == pytest.approx(same.pop("advantage"), abs=1e-4)
            assert row == same
        return wanted

    return run


@pytest.mark.slow
def test_two_processes_play_as_one(sampled_as_one):
    """Each has half of the environments, and both have the whole episodes."""
    rows = sampled_as_one(PLAYED)
    assert len(rows) > 0 and len({row["reward"] for row in rows}) > 1


@pytest.mark.slow
def test_two_processes_sample_judge_and_learn_as_one(sampled_as_one, tmp_path):
    rows = sampled_as_one(ONLINE)
    assert len(rows) == 3 * 24 and len({row["reward"] for row in rows}) > 2
    logged = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    found, wanted = ([row["eval/reward"] for row in rows if "eval/reward" in row] for rows in logged)
    assert found == wanted and len(wanted) == 3
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and any(np.abs(tensor).max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_both_and_they_go_on(arguments, tmp_path):
    more = (*MORE, "--config.steps=40", "--config.eval.every_steps=0", "--config.eval.samples=0", "--config.checkpoint.every_steps=0")
    assert main.main(arguments(tmp_path / "one", *more)) == 0
    command = [sys.executable, "-m", "ftjax", *arguments(tmp_path / "two", *more, "--distributed")]

    def interrupt(workers):
        while all(worker.poll() is None for worker in workers) and not steps(tmp_path / "two"):
            time.sleep(0.05)
        workers[1].send_signal(signal.SIGTERM)

    interrupted = together(command, during=interrupt)
    assert [code for code, _ in interrupted] == [0, 0], interrupted
    assert "SIGTERM: saved at step" in interrupted[0][1]
    before = steps(tmp_path / "two")
    assert 0 < len(before) < 40
    for code, said in together(command):
        assert code == 0, said
    found, wanted = steps(tmp_path / "two"), steps(tmp_path / "one")
    assert found == pytest.approx(wanted, rel=1e-5) and {step: found[step] for step in before} == before


def steps(workdir) -> dict[int, float]:
    """`{step: loss}` of what has been logged so far."""
    path = workdir / "metrics.jsonl"
    return {row["step"]: row["train/loss"] for row in read_jsonl(path) if "train/loss" in row} if path.exists() else {}


def rows(workdir) -> dict:
    """`{(step, name): value}` of what does not depend on the clock or on the process: losses and answers."""
    found = {(row["step"], name): row[name] for row in read_jsonl(workdir / "metrics.jsonl") for name in row}
    return {at: value for at, value in found.items() if at[1].endswith(("loss", "sample")) and at[1] != "step"}


def test_processes_that_see_different_folders_are_told_so(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = SimpleNamespace(others=[6])
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.asarray([mine, *seen.others]))
    runtime.agree("workdir: the last checkpoint", 6)
    with pytest.raises(ValueError, match=r"the last checkpoint is \[0, 6\]"):
        runtime.agree("workdir: the last checkpoint", 0)
