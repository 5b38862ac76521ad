"""What the reference says of every response, asked once before the training and kept on disk.

    FOLDER/<digest>/00000.npy …     of so many tokens' sequences each, in order: a log-probability for each trained token
                    about.json      what the digest is of
                    manifest.json   {file: sha256}, written last

The digest is of the reference's parameters and of the tokens with their mask, in which the data, the template, the tokenizer and the cuts
all show. So another model's numbers, or those of other data, are never read; runs that share a FOLDER share what is there for both. A pass
that is stopped goes on after its last whole file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ftjax import data, manifest
from ftjax.cli import build, objective
from ftjax.cli.run import Lessons, Run
from ftjax.data.loader import once
from ftjax.types import Batch, Model, Params

PART_TOKENS = 2**16
"""Of the sequences of one file: what is lost at most when a pass is killed."""
ABOUT = "about.json"


class Asked(NamedTuple):
    """The reference, and how much of it is asked at a time."""

    look: Callable[[Batch], jax.Array]
    """`look(batch) -> logps [rows, width]`."""
    fingerprint: str
    rows: int
    width: int


def told(run: Run, model: Model, params: Params, lessons: Lessons) -> Lessons | None:
    """Return the lessons with what the reference says of them; None if the run was asked to stop before all was said.

    Args:
      run: its config says where the numbers are kept.
      model: the architecture.
      params: of the reference.
      lessons: what is learnt from and what is held out.

    Raises:
      ValueError: what is on disk is damaged; the message names the file.
    """
    config, found = run.config, []
    asked = Asked(
        _look(config, model, run.mesh, params),
        fingerprint(model, params),
        rows=max(1, config.data.batch_size // config.data.accumulation),
        width=config.data.max_tokens,
    )
    folder = epath.Path(config.reference.folder or run.workdir / "reference")
    options = {"say": partial(run.terminal.say, soft_wrap=True), "stopped": lambda: run.stop.reason, "kept": _kept(folder)}
    for loader in (lessons.loader, lessons.held_out):
        if loader is not None:
            with run.terminal.console.status("asking the reference"):
                logps = recall(loader.sequences, folder, asked, **options)
            if logps is None:
                return None
            loader = loader.knowing(reference_logps=logps)
        found.append(loader)
    return lessons._replace(loader=found[0], held_out=found[1])


def recall(
    sequences: data.Sequences,
    folder: epath.Path,
    asked: Asked,
    *,
    say: Callable[[str], None] = print,
    stopped: Callable[[], Any] = lambda: None,
    kept: Sequence[Mapping[str, str]] | None = None,
) -> np.ndarray | None:
    """Return what the reference says of every token, float32 `[all tokens]`, from the disk as far as it is there; None if stopped.

    Args:
      sequences: the responses with their prompts.
      folder: where this is kept, and perhaps more.
      asked: the reference.
      say: hears what is done.
      stopped: returns why to stop, if there is a reason.
      kept: of what the folder holds already, in place of a look.

    Raises:
      ValueError: what is on disk is damaged.
    """
    count = len(sequences.lengths)
    about = {"model": asked.fingerprint, "data": sequences.sha256}
    place = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    whole = (place / manifest.MANIFEST).exists()
    if whole:
        _verify(place)
    else:
        others = _kept(folder) if kept is None else kept
        foreign = sum(other["model"] != about["model"] for other in others)
        stale = f"; what {folder} holds is of another model ({foreign}) or of other data ({len(others) - foreign})" if others else ""
        say(f"the reference {'goes on with' if place.exists() else 'is asked once about'} {count:,} responses{stale}")
    parts = []
    for at, (first, last) in enumerate(_ranges(sequences)):
        path = place / f"{at:05d}.npy"
        if not path.exists():
            if stopped():
                say(f"{stopped()}: the reference has spoken of {first:,} of {count:,} responses; the same command goes on from there.")
                return None
            place.mkdir(parents=True, exist_ok=True)
            manifest.write_whole(path, _as_npy(_said(sequences.part(first, last), asked)))
        parts.append(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    if not whole:
        manifest.write_whole(place / ABOUT, json.dumps(about, indent=1).encode())
        manifest.write(place)
    said = np.zeros(len(sequences.tokens), np.float32)
    said[sequences.loss_mask > 0] = np.concatenate(parts)
    say(f"the reference's log-probabilities of {count:,} responses {'read from' if whole else 'written to'} {place}")
    return said


def fingerprint(model: Model, params: Params) -> str:
    """Return the SHA-256 of an architecture and its parameters, one leaf after the other."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in leaves:
        leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _look(config, model: Model, mesh: Mesh, params: Params) -> Callable[[Batch], jax.Array]:
    score = objective.score(config, model, mesh, ("logps",))
    ask = jax.jit(lambda params, batch: score(params, batch).logps)
    return lambda batch: ask(params, build.on_mesh(batch, mesh))


def _ranges(sequences: data.Sequences) -> Iterator[tuple[int, int]]:
    """Yield `(first, last)` of the sequences of each file."""
    of = sequences.starts[:-1] // PART_TOKENS
    borders = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(of)]
    yield from zip(borders, borders[1:], strict=False)


def _said(part: data.Sequences, asked: Asked) -> np.ndarray:
    """Return the log-probabilities of the trained tokens of some sequences, which are asked for several in a row."""
    found = np.zeros(len(part.tokens), np.float32)
    for batch, at in once(part, rows=asked.rows, width=asked.width):
        real = batch.segment_ids > 0
        found[at[real]] = np.asarray(asked.look(batch), np.float32)[real]
    return found[part.loss_mask > 0]


def _kept(folder: epath.Path) -> list[dict[str, str]]:
    """Return of what the caches in a folder are."""
    places = [place / ABOUT for place in (folder.iterdir() if folder.exists() else ())]
    return [json.loads(place.read_text()) for place in places if place.exists()]


def _verify(place: epath.Path) -> None:
    try:
        manifest.verify(place)
    except manifest.Damaged as error:
        raise ValueError(f"reference: {error} Remove {place}, and the reference is asked again.") from error


def _as_npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
