"""The tensors of a PEFT file and the fields of our leaves: names, axes and stacks, as a method's `Format` has them.

base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight [r, i]   <->   lora/layers/self_attn/q_proj/kernel/a [L, i, r]
base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight [o, r]   <->   lora/layers/self_attn/q_proj/kernel/b [L, r, o]
base_model.model.model.norm.weight [d]   (in `modules_to_save`)         <->   full/norm/scale [d]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ftjax.hf import names
from ftjax.hf.lazy import LazyTensor
from ftjax.peft.format import Format, Tensor

PREFIX = "base_model.model."
EMBEDDING = "embed_tokens/kernel"

Shape = tuple[int, ...]
Found = dict[str, LazyTensor]


def key_of(tensor: Tensor, path: str) -> str:
    """Return what follows the module's name in PEFT's."""
    return tensor.embedding or tensor.key if path == EMBEDDING else tensor.key


def keys(form: Format, path: str) -> list[str]:
    """Return the keys that a module of this leaf may have."""
    return list(dict.fromkeys(key_of(tensor, path) for tensor in form.tensors.values()))


def ours(array: np.ndarray, axes: str) -> np.ndarray:
    """Return one layer's array in our order of axes."""
    here, there = axes.split("->")
    letters = there.replace("1", "")
    array = array.reshape([size for size, letter in zip(array.shape, there, strict=True) if letter != "1"])
    return array.transpose([letters.index(letter) for letter in here])


def theirs(array: np.ndarray, axes: str) -> np.ndarray:
    """Return one layer's array in PEFT's order of axes; the inverse of `ours`."""
    here, there = axes.split("->")
    array = array.transpose([here.index(letter) for letter in there if letter != "1"])
    sizes = iter(array.shape)
    return array.reshape([1 if letter == "1" else next(sizes) for letter in there])


def write_leaf(
    path: str, shape: Shape, arrays: Mapping[str, np.ndarray], form: Format, *, on: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Return PEFT's tensors of one leaf.

    Args:
      path: of the leaf.
      shape: of the matrix, layers first.
      arrays: by field, `[n, ...]` for the layers that it rides on; what is not trained is there for all layers.
      form: the method's.
      on: the modules that are written, and their places in what is trained; all if None.
    """
    every = {module: place for place, module in enumerate(names.modules(path, shape))}
    found = {}
    for field, array in arrays.items():
        tensor = form.tensors[field]
        layers = array if names.is_stacked(path) else array[None]
        for module, place in (every if on is None else on).items():
            one = layers[place if tensor.trained else every[module]]
            turned = tensor.turn[0](one, *shape[-2:]) if tensor.turn else theirs(one, tensor.axes)
            found[f"{PREFIX}{module}.{key_of(tensor, path)}"] = turned
    return found


def assign(module: str, found: Found, form: Format, path: str, sizes: Mapping[str, int]) -> tuple[Found, list[str]]:
    """Return `{field: tensor}` for the tensors `{key: tensor}` of one module, and what is missing or misshapen.

    Args:
      module: PEFT's name of it.
      found: by key.
      form: the method's.
      path: of the leaf.
      sizes: of the axes that are known; other letters are bound by the first tensor that has them.
    """
    sizes, fields, problems = dict(sizes), {}, []
    for key in keys(form, path):
        candidates = {field: tensor for field, tensor in form.tensors.items() if key_of(tensor, path) == key}
        expected = [shown(tensor, sizes) for tensor in candidates.values()][0]
        if key not in found:
            if not any(tensor.optional for tensor in candidates.values()):
                problems.append(f"missing: {PREFIX}{module}.{key} {expected}")
            continue
        fit = next((field for field, tensor in candidates.items() if fits(tensor, found[key].shape, sizes)), None)
        if fit is None:
            problems.append(f"misshapen: {PREFIX}{module}.{key} is {list(found[key].shape)}, expected {expected}")
            continue
        fields[fit] = found[key]
        sizes |= dict(zip(candidates[fit].axes.split("->")[1], found[key].shape, strict=True))
    return fields, problems


def fits(tensor: Tensor, shape: Shape, sizes: Mapping[str, int]) -> bool:
    """Return whether PEFT's tensor may have this shape where these axes are known."""
    letters = tensor.axes.split("->")[1]
    return len(letters) == len(shape) and all(
        size == (int(letter) if letter.isdigit() else sizes.get(letter, size)) for letter, size in zip(letters, shape, strict=True)
    )


def shown(tensor: Tensor, sizes: Mapping[str, int]) -> str:
    """Return the shape that PEFT's tensor should have, with a `?` for a size that is not known."""
    return "[" + ", ".join(letter if letter.isdigit() else str(sizes.get(letter, "?")) for letter in tensor.axes.split("->")[1]) + "]"


def stack(
    path: str, shape: Shape, layers: Mapping[str, Found], form: Format, scales: Mapping[str, float], *, least: Mapping[str, int] = {}
) -> dict[str, np.ndarray]:
    """Return the arrays of one leaf by field from `{module: {field: tensor}}`.

    A layer without an adapter gets the value that changes nothing. Where the method allows it, shorter ranks are padded with zeros (and
    all to the sizes of `least`, by axis), and the field `scaled` takes up what the scale of a module is to the leaf's (that of
    `leader`).

    Raises:
      ValueError: the layers cannot be one leaf.
    """
    modules = names.modules(path, shape)
    if differing := {frozenset(fields) for fields in layers.values()} - {frozenset(layers[next(iter(layers))])}:
        raise ValueError(f"peft: not yet: layers of {path!r} that differ in what they hold: {sorted(map(sorted, differing))}")
    arrays = {}
    for field in layers[next(iter(layers))]:
        tensor = form.tensors[field]
        read = {module: fields[field].read() for module, fields in layers.items()}
        values = {m: tensor.turn[1](array, *shape[-2:]) if tensor.turn else ours(array, tensor.axes) for m, array in read.items()}
        _check_stackable(path, field, values, form)
        largest = [max(sizes) for sizes in zip(*(value.shape for value in values.values()), strict=True)]
        if least:
            largest = [max(size, least.get(axis, 0)) for size, axis in zip(largest, tensor.axes.split("->")[0], strict=True)]
        dtype = np.float32 if tensor.trained else next(iter(values.values())).dtype
        whole = np.full((len(modules), *largest), tensor.neutral, dtype)
        for layer, module in enumerate(modules):
            if module in values:
                whole[layer] = 0
                whole[(layer, *map(slice, values[module].shape))] = values[module]
                if field == form.scaled and scales[module] != 1.0:
                    whole[layer] *= np.float32(scales[module])
        arrays[field] = whole if names.is_stacked(path) else whole[0]
    return arrays


def _check_stackable(path: str, field: str, values: Mapping[str, np.ndarray], form: Format) -> None:
    letters = form.tensors[field].axes.split("->")[0]
    sizes = zip(*(value.shape for value in values.values()), strict=True)
    differing = [letter for letter, found in zip(letters, sizes, strict=True) if len(set(found)) > 1]
    if differing and not (form.scaled and differing == ["r"]):
        raise ValueError(
            f"peft: not yet: layers of {path!r} whose {field!r} have different shapes, {differing} among [{', '.join(letters)}]"
        )


def common_layers(on: Mapping[str, Collection[str]], shapes: Mapping[str, Any]) -> list[int]:
    """Return the layers whose modules have the adapter, `{path: modules}`, if they are the same of all leaves; else none."""
    if not all(map(names.is_stacked, on)):
        return []
    found = {tuple(n for n, m in enumerate(names.modules(path, shapes[path].shape)) if m in modules) for path, modules in on.items()}
    return list(found.pop()) if len(found) == 1 else []


def leader(path: str, shape: Shape, ranks: Mapping[str, int], present: Collection[str]) -> str:
    """Return the module whose rank and alpha are those of the stacked leaf: the first of the largest rank."""
    return max((module for module in names.modules(path, shape) if module in present), key=lambda module: ranks[module])
