"""The adapter at the end of a run, as a folder in the workdir: PEFT's form where PEFT has the methods, else ftjax's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils

from ftjax import peft, tree
from ftjax.cli.build import Loaded
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import architecture
from ftjax.hf import peft as hf_peft
from ftjax.types import Params, Plan


def export(
    folder: epath.Path,
    loaded: Loaded,
    trainable: Params,
    plans: Sequence[Plan],
    frozen: Params,
    *,
    methods: hf_adapter.Methods,
    say: Callable,
) -> epath.Path | None:
    """Write what was trained and the tokenizer, in place of an earlier export; return the folder, or None where there is none.

    A local folder appears when everything in it is written. Where as much is trained as the model has, nothing is written: an adapter would
    be no smaller than the model (`ftjax export --workdir`).

    All processes take part; process 0 writes. Of the frozen tree goes in what a method keeps there for itself.

    Args:
      folder: where.
      loaded: the base.
      trainable: `{method name: tree}`.
      plans: `method.plan(params)`.
      frozen: the frozen tree.
      methods: names and arguments of the methods (see `build.methods`).
      say: tells the user why PEFT cannot read it, or why nothing was written.
    """
    own = {row.method for row in plans}
    frozen = {name: branch for name, branch in frozen.items() if name in own}
    if not hf_peft.exportable(plans) and tree.num_bytes(trainable) >= tree.num_bytes(jax.eval_shape(loaded.model.init, jax.random.key(0))):
        return None
    if jax.process_count() > 1:
        trainable, frozen = multihost_utils.process_allgather((trainable, frozen), tiled=True)
    if jax.process_index() != 0:
        return None
    remote = "://" in str(folder)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=None if remote else folder.parent) as temporary:
        written = Path(temporary) / "adapter"
        try:
            _write(written, loaded, trainable, plans, frozen, methods, say)
            if loaded.stretched:
                architecture.write(written, loaded.model.config)
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


def _write(
    written: Path,
    loaded: Loaded,
    trainable: Params,
    plans: Sequence[Plan],
    frozen: Params,
    methods: hf_adapter.Methods,
    say: Callable,
) -> None:
    about = {"base_name": loaded.name, "tokenizer": loaded.tokenizer}
    if hf_peft.exportable(plans):
        try:
            hf_peft.save_adapter(written, loaded.model, trainable, plans, frozen=frozen, **about)
            return
        except ValueError as error:
            say(f"PEFT has no place for all of this adapter, so it is in ftjax's own form: {error}")
    on_base = [(name, options) for name, options in methods if name in peft.METHODS]  # in how many bits that lies is not the adapter's
    hf_adapter.save_adapter(written, on_base, trainable, own=frozen, **about)


def _copy(written: Path, folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        target = folder / file.relative_to(written).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
