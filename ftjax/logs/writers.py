"""Where metrics go: JSON Lines, TensorBoard, Weights & Biases. A writer is `write(step, values)`, `text(step, name, text)`, `close()`.

Names have a slash and their group first: `train/loss`, `eval/accuracy`. Values are finished numbers on the host.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath


class Writer(Protocol):
    """A place for metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Record a text, such as a sample completion."""

    def close(self) -> None:
        """Write out what is buffered."""


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer] = ()):
        self._writers = tuple(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        for writer in self._writers:
            writer.text(step, name, text)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class Jsonl:
    """One JSON object a line: `{"step": 20, "time": 1732…, "train/loss": 1.25}`; a number that is not finite is null.

    A resumed run drops the lines beyond the step that it goes on from (they will come again), and a last line that a kill cut short.

    Args:
      path: the file; remote ones (`gs://…`) are rewritten at each line, as objects cannot be appended to.
      resume_step: the step that the run goes on from; 0 begins anew.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int = 0):
        self._path = epath.Path(path)
        lines = [line for line in read_jsonl(self._path) if line["step"] <= resume_step] if resume_step else []
        self._lines = [json.dumps(line) for line in lines]
        self._path.write_text("".join(f"{line}\n" for line in self._lines))
        self._file = None if "://" in str(path) else open(path, "a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._append({"step": step, "time": round(time.time(), 3), **{name: _finite(value) for name, value in values.items()}})

    def text(self, step: int, name: str, text: str) -> None:
        self._append({"step": step, "time": round(time.time(), 3), name: text})

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Record plain data at a step."""
        self._append({"step": step, **values})

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False)
        if self._file:
            self._file.write(f"{line}\n")
            return
        self._lines.append(line)
        self._path.write_text("".join(f"{line}\n" for line in self._lines))


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a last line that was cut short is left out."""
    path = epath.Path(path)
    rows = []
    # At ends of lines alone: what a model writes has other characters that `splitlines` takes for one.
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")) if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoard:
    """Event files for TensorBoard, through tensorboardX; each start of a run adds one.

    Args:
      folder: of the files.
      resume_step: the step that the run goes on from; TensorBoard forgets what lies beyond it. 0 begins anew: the files of starts that
        left no checkpoint are removed.
    """

    def __init__(self, folder: str | os.PathLike, *, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        for abandoned in [] if resume_step else list(epath.Path(folder).glob("events.out.tfevents.*")):
            abandoned.unlink()
        self._writer = SummaryWriter(os.fspath(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; the package is imported here and nowhere else."""

    def __init__(self, *, project: str, folder: str | os.PathLike, config: Mapping[str, Any], name: str):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ImportError(
                "logging.wandb: the package wandb is not installed; pip install 'ftjax[wandb]', or set it to False."
            ) from error
        self._run = wandb.init(project=project, dir=os.fspath(folder), config=dict(config), name=name, id=name, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
