"""Runs side by side, each on a core of its own: what a study of many small runs on a CPU is made of."""

import concurrent.futures
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence


def ended(workdir: pathlib.Path) -> bool:
    """Return whether a run has come to its end, where it draws its curve."""
    return any(workdir.glob("*.png"))


def finish(runs: Mapping[pathlib.Path, Sequence[str]]) -> None:
    """Run `ftjax train` with the arguments of each workdir, where it has not come to its end; log.txt there has what it said.

    As many run at a time as this process may use cores. A run that was interrupted goes on.
    """
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def run(workdir: pathlib.Path) -> None:
        if ended(workdir):
            return
        workdir.mkdir(parents=True, exist_ok=True)
        core = cores.get()
        command = [sys.executable, "-m", "ftjax", "train", *runs[workdir], f"--workdir={workdir}"]
        with open(workdir / "log.txt", "a") as log:
            pinned = {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}
            code = subprocess.run(command, **pinned).returncode
        cores.put(core)
        print(f"{workdir.name}: {'done' if code == 0 else f'exit code {code}, see log.txt'}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(run, runs))
