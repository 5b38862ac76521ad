"""Checkpoints: what a run needs to go on as if it had never stopped, each file vouched for by a SHA-256.

    workdir/checkpoints/00000200/state/         the train state, written by orbax, in the background
                                 record.json    step, config, metrics, and what else the loop remembers
                                 manifest.json  {file: sha256}, written last: a checkpoint is complete if and only if it has one

So a process killed at any moment leaves the checkpoint before whole, and no rename is needed, which object stores lack. Old checkpoints are
removed after the new manifest stands. The data position is the step: a batch is a function of it. `frozen` is not saved; it is a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ftjax import manifest
from ftjax.manifest import MANIFEST
from ftjax.types import TrainState

RECORD = "record.json"


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit; the message names the file or the leaf."""


class Record(NamedTuple):
    """What stands beside the state in a checkpoint."""

    step: int
    config: Mapping[str, Any]
    metrics: Mapping[str, float] = {}
    """Of the evaluation at this step, if there was one."""
    memory: Mapping[str, Any] = {}
    """Plain data that the loop wants back: the best value so far, results from before training."""


class Checkpoints:
    """The checkpoints of one run: saved without stopping it, the last few and the best kept.

    Every process of a run takes part in `save` and `restore`; process 0 alone writes records and manifests.

    Args:
      folder: where they are; anything etils can write, such as `gs://bucket/run/checkpoints`.
      keep: how many of the last to keep.
      best_metric: of `Record.metrics`; the checkpoint that is best by it is kept too. What ends in `loss` or `perplexity` is better low.
    """

    def __init__(self, folder: str | epath.Path, *, keep: int = 2, best_metric: str = "loss"):
        if keep < 1:
            raise ValueError(f"checkpoint.keep: at least the last checkpoint is kept, not {keep}.")
        folder = epath.Path(folder)
        self.folder = folder if "://" in str(folder) else folder.resolve()  # orbax takes absolute paths only
        self._keep, self._best_metric = keep, best_metric
        self._checkpointer = ocp.StandardCheckpointer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and (path / MANIFEST).exists())

    def best(self) -> int | None:
        """Return the step of the best checkpoint, or None if none was evaluated."""
        values = {}
        for step in self.steps():
            try:
                values[step] = self.record(step).metrics.get(self._best_metric)
            except CheckpointError as error:  # of an old step perhaps, and no reason not to save a new one
                print(f"{error}\nit is left out where the best is sought")
        return _best({step: value for step, value in values.items() if value is not None}, self._best_metric)

    def record(self, step: int) -> Record:
        """Read what stands beside the state."""
        stored = self._stored_record(step)
        return Record(**{name: stored[name] for name in Record._fields})

    def last_record(self, *, fall_back: bool = False) -> Record | None:
        """Read what stands beside the last state, or with `fall_back` beside the last whose record is not damaged; None if there is none.

        Raises:
          CheckpointError: the record, or with `fall_back` the record of every checkpoint, is damaged.
        """
        for candidate in reversed(steps := self.steps()):
            try:
                self.verify(candidate, only=RECORD)
                return self.record(candidate)
            except CheckpointError:
                if not fall_back or candidate == steps[0]:
                    raise
        return None

    def save(self, state: TrainState, record: Record) -> None:
        """Start saving; return as soon as the state may change again. A checkpoint of this step that is there already is left alone."""
        self.wait()
        if record.step in self.steps():
            return
        path = self._path(record.step)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                path.rmtree()  # what a killed process left of it
        if jax.process_count() > 1:
            ocp.multihost.sync_global_processes(f"ftjax:save:{record.step}")
        self._checkpointer.save(path / "state", _snapshot(_storable(state)))
        # Not a daemon: an interpreter that ends waits for the last checkpoint.
        self._thread = threading.Thread(target=self._finish, args=(path, record, _leaves(state)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is complete, and raise what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if jax.process_count() > 1:  # all of them see the manifest that process 0 has written, and what it removed
                ocp.multihost.sync_global_processes("ftjax:saved")
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, like: TrainState, *, step: int | None = None, fall_back: bool = False) -> tuple[TrainState, Record]:
        """Return the state and the record of a checkpoint, every byte verified.

        Args:
          like: a state of the same structure, concrete or abstract: its shapes, dtypes and shardings are those of the result.
          step: which; the last if None.
          fall_back: try the one before a damaged one instead of raising. Who trains on from there calls `set_aside`.

        Raises:
          CheckpointError: there is none; a file is missing, truncated or changed; or the state has another structure than `like`.
        """
        self.wait()
        candidates = [s for s in reversed(self.steps()) if step is None or s == step]
        if not candidates:
            which = "" if step is None else f" of step {step}; it has {', '.join(map(str, self.steps())) or 'none'}"
            raise CheckpointError(f"checkpoint: {self.folder} has no complete checkpoint{which}.")
        for candidate in candidates:
            try:
                self.verify(candidate)
                break
            except CheckpointError as error:
                if not fall_back or candidate == candidates[-1]:
                    raise
                print(f"{error}\ngoing back to the checkpoint before it")
        return self._read(candidate, like), self.record(candidate)

    def set_aside(self, *, after: int) -> None:
        """Rename the checkpoints after a step, which `restore` found damaged, to `….damaged`; one of that name from before goes."""
        for step in self.steps() if jax.process_index() == 0 else ():
            if step > after:
                aside = self.folder / f"{step:08d}.damaged"
                if aside.exists():
                    aside.rmtree()
                self._path(step).rename(aside)

    def verify(self, step: int, *, only: str | None = None) -> None:
        """Compare every file of a checkpoint with its manifest, or `only` the one of that name."""
        path = self._path(step)
        try:
            manifest.verify(path, only=only)
        except manifest.Damaged as error:
            remedy = f"Remove {path} or set --config.checkpoint.fall_back to go on from the one before."
            raise CheckpointError(f"checkpoint: {error} {remedy}") from error

    def close(self) -> None:
        """Wait for the last save and let orbax go."""
        self.wait()
        self._checkpointer.close()

    def _path(self, step: int) -> epath.Path:
        return self.folder / f"{step:08d}"

    def _finish(self, path: epath.Path, record: Record, leaves: Mapping[str, str]) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                (path / RECORD).write_text(json.dumps({**record._asdict(), "leaves": leaves}, indent=1))
                manifest.write(path)
                self._prune()
        except BaseException as error:  # raised again in the main thread by `wait`
            self._error = error

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*steps[-self._keep :], self.best()}
        for step in steps:
            if step not in kept:
                (self._path(step) / MANIFEST).unlink()  # first, so that half a checkpoint is never taken for a whole one
                self._path(step).rmtree()

    def _read(self, step: int, like: TrainState) -> TrainState:
        stored, expected = self._stored_record(step)["leaves"], _leaves(like)
        unlike = [
            f"{path}: {stored.get(path, 'absent')} in the checkpoint, {expected.get(path, 'absent')} in this run"
            for path in sorted(stored.keys() | expected.keys())
            if stored.get(path) != expected.get(path)
        ]
        if unlike:
            listing = "\n  ".join(unlike[:8] + ["…"] * (len(unlike) > 8))
            raise CheckpointError(f"checkpoint: {self._path(step)} holds another state than this run has:\n  {listing}")
        found = self._checkpointer.restore(self._path(step) / "state", _abstract(like))
        return TrainState(**{**found, "key": jax.random.wrap_key_data(found["key"])})

    def _stored_record(self, step: int) -> dict[str, Any]:
        path = self._path(step) / RECORD
        try:
            stored = json.loads(path.read_text())
            if missing := {*Record._fields, "leaves"} - set(stored):
                raise ValueError(f"{', '.join(sorted(missing))} missing")
            return stored
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint: {path} cannot be read: {error}") from error


SMALLER = ("loss", "perplexity", "nll", "divergence", "kl", "error", "repetition")
"""How the names of metrics end of which less is better; of all others more is."""


def improves(value: float, than: float | None, metric: str) -> bool:
    """Return whether `value` is a better `metric` than another value, or than none; a NaN never is."""
    if than is None:
        return value == value
    return value < than if metric.rpartition("/")[2].endswith(SMALLER) else value > than


def _best(values: Mapping[int, float], metric: str) -> int | None:
    best = None
    for step, value in sorted(values.items()):
        if improves(value, None if best is None else values[best], metric):
            best = step
    return best


@contextlib.contextmanager
def lock(workdir: str | epath.Path) -> Iterator[None]:
    """Hold a working directory for this process alone.

    The lock is the kernel's (`flock`), so that of a process that died is gone with it. Object stores have none: there nothing is held.

    Raises:
      ValueError: another process holds it; the message says which.
    """
    if "://" in str(workdir):
        yield
        return
    path = os.path.join(os.fspath(workdir), ".lock")
    os.makedirs(workdir, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"workdir: {os.fspath(workdir)!r} is in use by {holder}; wait for it, stop it, or choose another.") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _storable(state: TrainState) -> dict[str, Any]:
    """Return the state as a dict of plain arrays: of the key, its data."""
    stored = {"step": state.step, "key": jax.random.key_data(state.key), "trainable": state.trainable, "opt_state": state.opt_state}
    return stored | ({"carried": state.carried} if state.carried else {})


def _leaves(state: TrainState) -> dict[str, str]:
    """Return `{path: "float32[2, 4]"}`, stored so that a state of another structure is refused by name."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths}


def _abstract(like: TrainState) -> dict[str, Any]:
    """Return shapes and shardings to restore into; a key, which is small, is whole on every device of its mesh."""
    shapes = jax.eval_shape(_storable, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like))
    where = _storable_shardings(like)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where)


def _storable_shardings(like: TrainState) -> dict[str, Any]:
    where = jax.tree.map(lambda x: x.sharding, like)
    key = where.key
    if isinstance(key, jax.sharding.NamedSharding):
        key = jax.sharding.NamedSharding(key.mesh, jax.sharding.PartitionSpec())
    stored = {"step": where.step, "key": key, "trainable": where.trainable, "opt_state": where.opt_state}
    return stored | ({"carried": where.carried} if where.carried else {})


_copy = jax.jit(partial(jax.tree.map, jnp.copy))


def _snapshot(tree: Any) -> Any:
    """Return arrays that the next step cannot overwrite: on a CPU orbax reads the very buffers that the step donates."""
    return _copy(tree) if jax.default_backend() == "cpu" else tree
