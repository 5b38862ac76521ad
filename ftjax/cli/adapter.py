"""The adapter at the end of a run, as a PEFT folder in the workdir."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils

from ftjax.cli.build import Loaded
from ftjax.hf import peft as hf_peft
from ftjax.types import Params, Plan


def export(
    folder: epath.Path, loaded: Loaded, trainable: Params, plans: Sequence[Plan], frozen: Params, *, say: Callable
) -> epath.Path | None:
    """Write what was trained and the tokenizer, in place of an earlier export; return the folder, or None where it is no adapter to PEFT.

    A local folder appears when everything in it is written.

    All processes take part; process 0 writes. `say` tells the user why nothing was written. Of the frozen tree goes in what a
    method keeps there for itself.
    """
    own = {row.method for row in plans}
    frozen = {name: branch for name, branch in frozen.items() if name in own}
    if not hf_peft.exportable(plans):
        return None
    if jax.process_count() > 1:
        trainable, frozen = multihost_utils.process_allgather((trainable, frozen), tiled=True)
    if jax.process_index() != 0:
        return None
    remote = "://" in str(folder)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=None if remote else folder.parent) as temporary:
        written = Path(temporary) / "adapter"
        try:
            hf_peft.save_adapter(written, loaded.model, trainable, plans, base_name=loaded.name, tokenizer=loaded.tokenizer, frozen=frozen)
        except ValueError as error:
            say(f"no adapter folder was written: {error}")
            return None
        if remote:
            _copy(written, folder)
        else:
            if folder.exists():
                os.replace(folder, Path(temporary) / "earlier")
            os.replace(written, folder)
    return folder


def _copy(written: Path, folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        target = folder / file.relative_to(written).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
