"""Several models into one: averages, spherical interpolation, task vectors, stacks of layers.

The models are read and the result is written tensor by tensor, so a few tensors are in memory and no model ever is. All arithmetic is in
float32; each tensor is rounded once, to the dtype that the first model has it in.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax import tree
from ftjax.hf import names
from ftjax.hf.folder import Checkpoint
from ftjax.hf.write import SHARD_BYTES, Entry, new_folder, write_json, write_shards, write_tokenizer
from ftjax.peft import vectors


class Inputs(NamedTuple):
    """One tensor of every model, in float32."""

    models: Sequence[np.ndarray]
    base: np.ndarray | None
    factors: Sequence[float]
    density: float
    random: np.random.Generator

    @property
    def changes(self) -> list[np.ndarray]:
        """The task vectors."""
        return [x - self.base for x in self.models]


def linear(x: Inputs) -> np.ndarray:
    """Σ f_k W_k / Σ f_k: a weighted average, a "model soup" (Wortsman et al. 2022, arXiv:2203.05482)."""
    return vectors.linear(x.models, x.factors) / np.float32(sum(x.factors))


def slerp(x: Inputs) -> np.ndarray:
    """sin((1-t)Ω)/sin Ω W_0 + sin(tΩ)/sin Ω W_1, Ω the angle between two tensors as vectors, t = f_1 / (f_0 + f_1) (Shoemake 1985).

    Where they are almost parallel, or one is zero, it is the average that the limit is.
    """
    first, second = (m.ravel().astype(np.float64) for m in x.models)
    t = x.factors[1] / sum(x.factors)
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    angle = np.arccos(np.clip(first @ second / norms, -1, 1)) if norms else 0.0
    if np.sin(angle) < 1e-4:
        return linear(x)
    mixed = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
    return mixed.reshape(x.models[0].shape).astype(np.float32)


def model_stock(x: Inputs) -> np.ndarray:
    """W_base + t (mean(W_k) - W_base) with t = N cos θ / (1 + (N - 1) cos θ), θ the mean angle of the task vectors.

    Jang et al. 2024, arXiv:2403.19522, equation 4, for each tensor by itself. Factors are not used: the angle decides.
    """
    changes = [c.ravel().astype(np.float64) for c in x.changes]
    count = len(changes)
    units = [c / max(np.linalg.norm(c), np.finfo(np.float64).tiny) for c in changes]
    cosine = max(0.0, float(np.mean([a @ b for a, b in itertools.combinations(units, 2)])))
    t = count * cosine / (1 + (count - 1) * cosine)
    return x.base + np.float32(t) * vectors.linear(x.changes, [1 / count] * count)


def task_arithmetic(x: Inputs) -> np.ndarray:
    """W_base + Σ f_k (W_k - W_base); a negative factor takes a task away (Ilharco et al. 2023, arXiv:2212.04089)."""
    return x.base + vectors.linear(x.changes, x.factors)


def ties(x: Inputs) -> np.ndarray:
    """W_base + `vectors.ties` of the changes."""
    return x.base + vectors.ties(x.changes, x.factors, density=x.density)


def dare(x: Inputs) -> np.ndarray:
    """W_base + `vectors.dare` of the changes."""
    return x.base + vectors.dare(x.changes, x.factors, density=x.density, random=x.random)


def dare_ties(x: Inputs) -> np.ndarray:
    """W_base + `vectors.dare_ties` of the changes."""
    return x.base + vectors.dare_ties(x.changes, x.factors, density=x.density, random=x.random)


RECIPES: dict[str, Callable[[Inputs], np.ndarray]] = {
    recipe.__name__: recipe for recipe in (linear, slerp, model_stock, task_arithmetic, ties, dare, dare_ties)
}
NEED_BASE = ("model_stock", "task_arithmetic", "ties", "dare", "dare_ties")


def mix(
    folder: str | Path,
    models: Sequence[Checkpoint],
    tokenizer: Any,
    *,
    recipe: str,
    base: Checkpoint | None = None,
    factors: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the mixture of several models of one architecture as a Hugging Face folder.

    Args:
      folder: a new folder; it appears when everything in it is written.
      models: at least two (`slerp`: exactly two), with the same tensors in the same shapes.
      tokenizer: written beside the weights; None writes none.
      recipe: one of `RECIPES`.
      base: the model they were tuned from, for the recipes in `NEED_BASE`.
      factors: one for each model; equal shares (1/N) if None, and 1 each for `task_arithmetic`, `ties` and `dare`.
      density: the share of each task vector that `ties` and `dare` keep.
      seed: of `dare`; a tensor's drops depend on it and on the tensor's name alone.
      shard_bytes: the size of one file of weights.

    Raises:
      ValueError: the models do not have the same tensors (all that differs is listed), or an argument is out of range.
      FileExistsError: the folder exists and is not empty.
    """
    _check(models, recipe, base, factors)
    models, base = [_plain(model) for model in models], base and _plain(base)
    if factors is None:
        factors = [1.0] * len(models) if recipe in NEED_BASE else [1 / len(models)] * len(models)
    everyone = [*models, *([base] if base is not None else [])]
    _same_tensors(everyone)
    combine, first = RECIPES[recipe], models[0].tensors

    def mixed() -> Iterator[np.ndarray]:
        for name, tensor in first.items():
            *values, last = [one.tensors[name].read().astype(np.float32) for one in everyone] + ([None] if base is None else [])
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            yield combine(Inputs(values, last, factors, density, random)).astype(tensor.dtype)

    parts = [f"- {one.path.name}: {factor:g}" for one, factor in zip(models, factors, strict=True)]
    note = f"A `{recipe}` merge" + (f" over {base.path.name}" if base is not None else "") + ":\n\n" + "\n".join(parts)
    entries = [Entry(name, tensor.dtype, tensor.shape) for name, tensor in first.items()]
    return _write(Path(folder), models[0].config, entries, mixed(), tokenizer, note, shard_bytes)


def passthrough(
    folder: str | Path,
    slices: Sequence[tuple[Checkpoint, int, int]],
    tokenizer: Any,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model whose layers are those of others, one slice after the other: `(model, first layer, end)` each.

    Embedding, final norm and head are the first model's. The result is as deep as the slices together, and needs training to be good.

    Raises:
      ValueError: a slice is empty or beyond its model, or the models' layers are not of one shape.
    """
    slices = [(_plain(model), start, stop) for model, start, stop in slices]
    for model, start, stop in slices:
        depth = model.config["num_hidden_layers"]
        if not 0 <= start < stop <= depth:
            raise ValueError(f"merge: {model.path.name} has layers 0 to {depth}; the slice {start}:{stop} is not inside.")
    sources = [(model, layer) for model, start, stop in slices for layer in range(start, stop)]
    head = slices[0][0]
    taken: dict[str, Any] = {name: tensor for name, tensor in head.tensors.items() if _layer(name) is None}
    shapes = {_in_layer(name, 0): tensor.shape for name, tensor in head.tensors.items() if _layer(name) is not None}
    for place, (model, layer) in enumerate(sources):
        here = {_in_layer(name, 0): tensor for name, tensor in model.tensors.items() if _layer(name) == layer}
        if {name: tensor.shape for name, tensor in here.items()} != shapes:
            raise ValueError(f"merge: layer {layer} of {model.path.name} is not of the shape of {head.path.name}'s layers.")
        taken |= {_in_layer(name, place): tensor for name, tensor in here.items()}
    config = head.config | {"num_hidden_layers": len(sources)}
    if config.get("layer_types"):
        config["layer_types"] = [model.config["layer_types"][layer] for model, layer in sources]
    note = "Layers, in order:\n\n" + "\n".join(f"- {model.path.name}: {start} to {stop}" for model, start, stop in slices)
    entries = [Entry(name, tensor.dtype, tensor.shape) for name, tensor in taken.items()]
    return _write(Path(folder), config, entries, (tensor.read() for tensor in taken.values()), tokenizer, note, shard_bytes)


def _plain(model: Checkpoint) -> Checkpoint:
    """Return the model without what no text model reads, and without a copy of the embedding that calls itself the head."""
    tied = model.config.get("tie_word_embeddings", False)
    wanted = {n: t for n, t in model.tensors.items() if not names.ignorable(n) and not (tied and n == "lm_head.weight")}
    return model._replace(tensors=wanted)


def _layer(name: str) -> int | None:
    return names.path(name)[1]


def _in_layer(name: str, layer: int) -> str:
    """Return the name of the same tensor in another layer."""
    return name.replace(f"layers.{_layer(name)}.", f"layers.{layer}.", 1)


def _check(models: Sequence[Checkpoint], recipe: str, base: Checkpoint | None, factors: Sequence[float] | None) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"merge: there is no recipe {recipe!r}; nearest: {tree.nearest(recipe, [*RECIPES, 'passthrough'])}.")
    if len(models) < (1 if recipe == "task_arithmetic" else 2) or (recipe == "slerp" and len(models) != 2):
        raise ValueError(f"merge: {recipe} takes {'two' if recipe == 'slerp' else 'two or more'} models, not {len(models)}.")
    if (base is None) == (recipe in NEED_BASE):
        needs = "needs the base that the models were tuned from" if base is None else "takes no base"
        raise ValueError(f"merge: {recipe} {needs}.")
    if factors is not None and (len(factors) != len(models) or not all(map(np.isfinite, factors))):
        raise ValueError(f"merge: {len(models)} models need as many finite factors, not {list(factors)}.")
    if factors is not None and recipe in ("linear", "slerp") and sum(factors) <= 0:
        raise ValueError(f"merge: the factors of {recipe} are shares and must have a positive sum, not {list(factors)}.")


def _same_tensors(models: Sequence[Checkpoint]) -> None:
    first, problems = models[0], []
    for other in models[1:]:
        for name in sorted(first.tensors.keys() | other.tensors.keys()):
            here, there = (one.tensors[name].shape if name in one.tensors else "missing" for one in (first, other))
            if here != there:
                problems.append(f"{name}: {here} in {first.path.name}, {there} in {other.path.name}")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"merge: the models are not of one architecture ({len(problems)} tensors differ):\n  {shown}")


def _write(
    folder: Path,
    config: Mapping[str, Any],
    entries: Sequence[Entry],
    arrays: Iterator[np.ndarray],
    tokenizer: Any,
    note: str,
    shard_bytes: int,
) -> Path:
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", dict(config))
        (temporary / "README.md").write_text(_CARD.format(note=note), encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer)
        write_shards(temporary, entries, arrays, shard_bytes=shard_bytes)
    return folder


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- ftjax
- merge
---

# Model card

{note}

Written by `ftjax merge`.
"""
