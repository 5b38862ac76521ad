"""Several processes are one run: the same numbers, the same answers, one workdir."""

import os
import pathlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from ftjax.cli import main, runtime
from ftjax.logs.writers import read_jsonl

ROOT = pathlib.Path(__file__).parents[2]
MORE = (
    "--config.steps=3",
    "--config.mesh.fsdp=2",
    "--config.eval.every_steps=3",
    "--config.eval.samples=1",
    "--config.logging.every_steps=1",
)


def together(command: list[str], count: int = 2) -> list[tuple[int, str]]:
    """Run a command as several processes of one run; return their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen(command, cwd=ROOT, env={**shared, "JAX_PROCESS_ID": str(n)}, **pipes) for n in range(count)]
    try:
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
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()


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
