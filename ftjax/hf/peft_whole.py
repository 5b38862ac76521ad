"""Leaves that were trained themselves, in PEFT's files: saved whole beside an adapter, or as what an adapter is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftjax import peft, tree
from ftjax.hf import names
from ftjax.hf import peft_tensors as tensors
from ftjax.hf.lazy import LazyTensor
from ftjax.types import Params, Plan, Transform

KINDS = ("full", "bitfit", "norm_tuning")
"""The methods that train leaves themselves."""


def chosen(path: str, shape: Sequence[int], row: Plan) -> list[str]:
    """Return the Hugging Face tensors that a rule trains of one of its leaves."""
    every = names.tensors(path, tuple(shape))
    return [every[layer] for layer in row.options["layers"]] if "layers" in row.options else every


def write(path: str, shape: Sequence[int], row: Plan, value: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of a leaf that a rule trained itself, by their names in the model."""
    layers = value if names.is_stacked(path) else value[None]
    pairs = zip(chosen(path, shape, row), layers, strict=True)
    return {name: one.T if names.is_transposed(path) else one for name, one in pairs}


def _stacked(path: str, layers: Sequence[LazyTensor]) -> np.ndarray:
    """Return a leaf that was trained itself, float32; the inverse of `write`."""
    values = [tensor.read().astype(np.float32) for tensor in layers]
    values = [value.T for value in values] if names.is_transposed(path) else values
    return np.stack(values) if names.is_stacked(path) else values[0]


def rules(kind: str, found: Mapping[str, LazyTensor], leaves: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Params]:
    """Return the arguments of the methods that train these tensors, one for each set of layers, and their trained tree.

    Args:
      kind: the method's name; the second one is called `kind_2`.
      found: by the name in the model, each of a leaf's shape.
      leaves: the base's shapes.
    """
    groups: dict[tuple[int, ...] | None, dict[str, list[LazyTensor]]] = {}
    for path in leaves:
        every = names.tensors(path, leaves[path].shape)
        here = tuple(layer for layer, name in enumerate(every) if name in found)
        if here:
            layers = None if len(here) == len(every) else here
            groups.setdefault(layers, {})[path] = [found[every[layer]] for layer in here]
    options, trainable = [], {}
    for number, (layers, by_path) in enumerate(groups.items(), start=1):
        name = kind if number == 1 else f"{kind}_{number}"
        options.append({"targets": "|".join(map(re.escape, by_path)), "layers": layers, "name": name})
        trainable[name] = tree.unflatten({path: jnp.asarray(_stacked(path, layers)) for path, layers in by_path.items()})
    return options, trainable


def read(
    config: Mapping[str, Any], found: Mapping[str, LazyTensor], leaves: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor], list[str]]:
    """Return the tensors of `modules_to_save` by their names in the model, the other tensors of a folder, and what does not fit."""
    if not config.get("modules_to_save"):
        return {}, dict(found), []
    parameters = {name: path for path in leaves for name in names.tensors(path, leaves[path].shape)}
    saved, rest = {}, {}
    for full_name, tensor in found.items():
        name = names.canonical(full_name.removeprefix(tensors.PREFIX))
        if name in parameters:
            saved[name] = tensor
        else:
            rest[full_name] = tensor
    paths = {parameters[name] for name in saved}
    wanted = {name for path in paths for name in names.tensors(path, leaves[path].shape)}
    problems = misfits(saved, wanted, leaves) + tied(paths, leaves)
    return {} if problems else saved, rest, problems


def beside(
    kind: str, method: Transform, trainable: Params, found: Mapping[str, LazyTensor], leaves: Mapping[str, Any]
) -> tuple[Transform, Params]:
    """Return a method and its trained tree with those of `kind` on what was trained itself, or as they are where that is nothing."""
    if not found:
        return method, trainable
    options, trained = rules(kind, found, leaves)
    return peft.chain(method, *(peft.METHODS[kind](**each) for each in options)), {**trainable, **trained}


def tied(paths: Collection[str], leaves: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with training these leaves themselves where the head is the embedding."""
    bad = "lm_head/kernel" not in leaves and tensors.EMBEDDING in paths
    return ["not yet: an adapter on an embedding that is tied to the head"] if bad else []


def misfits(
    found: Mapping[str, LazyTensor], wanted: Collection[str], leaves: Mapping[str, Any], *, shown: Mapping[str, str] = {}
) -> list[str]:
    """Return what is missing, extra or misshapen among tensors by their names in the model.

    Args:
      found: what the file has.
      wanted: what it should have.
      leaves: the base's shapes.
      shown: the names in the file, where they are others.
    """
    shapes = {name: names.leaf_shape(path, leaf.shape) for path, leaf in leaves.items() for name in names.tensors(path, leaf.shape)}

    def theirs(name: str) -> str:
        return shown.get(name, f"{tensors.PREFIX}{name}")

    problems = [f"missing: {theirs(name)} {list(shapes[name])}" for name in sorted(set(wanted) - found.keys())]
    problems += [f"extra: {theirs(name)} {list(found[name].shape)}" for name in sorted(found.keys() - set(wanted))]
    return problems + [
        f"misshapen: {theirs(name)} is {list(tensor.shape)}, expected {list(shapes[name])}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != shapes[name]
    ]
