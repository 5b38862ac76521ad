"""The adapter at the end of a run, as a PEFT folder in the workdir."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils

from ftjax.cli.build import Loaded
from ftjax.hf import peft as hf_peft
from ftjax.types import Params, Plan


def export(folder: epath.Path, loaded: Loaded, trainable: Params, plans: Sequence[Plan], *, say: Callable) -> epath.Path | None:
    """Write what was trained, in place of an earlier export, and return the folder; None where it is no adapter in PEFT's sense.

    All processes take part; process 0 writes. `say` tells the user why nothing was written.
    """
    if not any("rank" in row.options for row in plans if row.method in trainable):
        return None
    if jax.process_count() > 1:
        trainable = multihost_utils.process_allgather(trainable, tiled=True)
    if jax.process_index() != 0:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            written = hf_peft.save_adapter(Path(temporary) / "adapter", loaded.model, trainable, plans, base_name=loaded.name)
        except ValueError as error:
            say(f"no adapter folder was written: {error}")
            return None
        if folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True)
        for file in sorted(written.iterdir()):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder
