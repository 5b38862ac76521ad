"""Leaves that were trained themselves, in PEFT's files: saved whole beside an adapter, or as what an adapter is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

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
        trainable[name] = tree.unflatten({path: jnp.asarray(tensors.read_whole(path, parts)) for path, parts in by_path.items()})
    return options, trainable


def read(
    config: Mapping[str, Any], found: Mapping[str, LazyTensor], leaves: Mapping[str, Any]
) -> tuple[dict[str, list[LazyTensor]], dict[str, LazyTensor], list[str]]:
    """Return the tensors of each leaf of `modules_to_save`, the other tensors of a folder, and what does not fit."""
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
    every = {path: names.tensors(path, leaves[path].shape) for path in leaves if path in paths}
    problems = misfits(saved, [name for of in every.values() for name in of], leaves) + tied(paths, leaves)
    return ({} if problems else {path: [saved[name] for name in of] for path, of in every.items()}), rest, problems


def beside(method: Transform, trainable: Params, saved: Mapping[str, Sequence[LazyTensor]]) -> tuple[Transform, Params]:
    """Return a method and its trained tree with `full` on what was saved whole, or as they are where that is nothing."""
    if not saved:
        return method, trainable
    tree_ = tree.unflatten({path: jnp.asarray(tensors.read_whole(path, found)) for path, found in saved.items()})
    return peft.chain(method, peft.full("|".join(map(re.escape, saved)))), {**trainable, "full": tree_}


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
