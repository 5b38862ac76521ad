"""What goes into a PEFT folder of an adapter on matrices: the fields of its config and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax import peft, tree
from ftjax.hf import names, peft_whole
from ftjax.hf import peft_bias as biases
from ftjax.hf import peft_head as head
from ftjax.hf import peft_norms as norms
from ftjax.hf import peft_tensors as tensors
from ftjax.hf import peft_tokens as token_rows
from ftjax.hf.peft_config import PATTERNS, fields, owners, short, shortest_names, targeted, to_peft
from ftjax.types import Model, Params, Plan


def contents(model: Model, trainable: Params, plans: Sequence[Plan], frozen: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of the config and the tensors of what was trained: `save_adapter` says of what.

    Raises:
      ValueError: PEFT's folders have no place for something; all problems are listed.
    """
    names = {row.method for row in plans if token_rows.is_of(row) or head.is_of(row)}
    others = [row for row in plans if row.method in trainable.keys() - names]
    form = next((peft.FORMATS[row.known_as].peft_type for row in others if row.known_as in peft.FORMATS), None)
    beside = form or (others[0].method if others else None)
    fields, rows = token_rows.write(trainable, plans, beside=beside, tied="lm_head/kernel" not in model_leaves(model))
    if not others and rows:
        return fields, rows
    config, found = _on_modules(model, {name: branch for name, branch in trainable.items() if name not in names}, others, frozen)
    config, found = head.write(config | fields, found | rows, trainable, plans)
    return config, dict(sorted(found.items()))


class Parts(NamedTuple):
    """What was trained, by how PEFT has it."""

    adapters: list[Plan]
    """Rules of methods that ride on matrices."""
    norms: list[Plan]
    """Rules of norm tuning, where it is the folder's method."""
    biases: dict[str, Plan]
    """By path, biases without their matrix, which go by a word of the config."""
    whole: dict[str, Plan]
    """By path, other leaves that were trained themselves: `modules_to_save`."""


def _on_modules(model: Model, trainable: Params, plans: Sequence[Plan], frozen: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of the config and the tensors of an adapter on modules."""
    trainable, plans = peft.plain(frozen, trainable, plans)
    flat, leaves = {name: tree.flatten(branch) for name, branch in trainable.items()}, model_leaves(model)
    parts = _parts([row for row in plans if row.method in trainable], flat, leaves)
    modules = {module for row in parts.adapters for found in _carriers(row, flat, leaves).values() for module in found}
    form = peft.FORMATS[parts.adapters[0].known_as] if parts.adapters else None
    word = biases.which(parts.biases, parts.whole, modules, form, leaves) if form else biases.NONE
    _check_exportable(trainable, parts, leaves, word=word)
    if form is None:
        config, found = norms.write(parts.norms, trainable, leaves)
    else:
        config, found = _on_matrices(form, parts.adapters, flat, frozen, leaves)
        config |= {biases.FIELD: word} if parts.biases else {}
    found |= biases.write(parts.biases, trainable, modules, leaves)
    for path, row in parts.whole.items():
        written = peft_whole.write(path, leaves[path].shape, row, np.asarray(flat[row.method][path]))
        found |= {f"{tensors.PREFIX}{name}": one for name, one in written.items()}
    config["modules_to_save"] = shortest_names(owners(parts.whole, leaves), owners(leaves, leaves), str.endswith) or None
    return config, found


def _parts(rows: Sequence[Plan], flat: Mapping[str, Any], leaves: Mapping[str, Any]) -> Parts:
    itself = [row for row in rows if all(path in flat[row.method] for path in row.paths)]
    adapters = [row for row in rows if row not in itself and row.known_as in peft.FORMATS]
    of_norms = [] if adapters else [row for row in itself if norms.is_of(row)]
    others = [row for row in itself if row not in of_norms]
    lone = biases.alone(others, leaves)
    return Parts(adapters, of_norms, lone, {path: row for row in others for path in row.paths if path not in lone})


def _carriers(row: Plan, flat: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return `{module: its place in our arrays}` by path, of the modules that have the adapter."""
    mark, found = peft.FORMATS[row.known_as].mark, {}
    for path in row.paths:
        modules = names.modules(path, leaves[path].shape)
        chosen = [modules[layer] for layer in row.options["layers"]] if "layers" in row.options else modules
        found[path] = {module: place for place, module in enumerate(chosen)}
        if mark and names.is_stacked(path):
            marks = np.asarray(flat[row.method][f"{path}/{mark}"])
            found[path] = {module: place for module, place in found[path].items() if marks[place].any()}
    return found


def _on_matrices(
    form: peft.Format, rows: list[Plan], flat: Mapping[str, Any], frozen: Params, leaves: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of the config and the tensors of one method on matrices."""
    own = tree.flatten(frozen.get(rows[0].method, {}))
    untrained = [f"{path}/{field}" for row in rows for path in row.paths for field, tensor in form.tensors.items() if not tensor.trained]
    if absent := [field for field in (*form.shared, *untrained) if field not in own]:
        raise ValueError(f"peft: {rows[0].method} keeps {absent[0]!r} in the frozen tree, which was not given: pass frozen=frozen")
    found = {tensor.key: tensors.theirs(np.asarray(own[field]), tensor.axes) for field, tensor in form.shared.items() if field in own}
    carriers: dict[str, dict[str, int]] = {}
    for row in rows:
        values = own | flat[row.method]
        carriers |= _carriers(row, flat, leaves)
        for path in row.paths:
            arrays = {field: np.asarray(values[f"{path}/{field}"]) for field in form.tensors if f"{path}/{field}" in values}
            found |= tensors.write_leaf(path, leaves[path].shape, arrays, form, on=carriers[path])
    return _config(form, rows, carriers, leaves, flat[rows[0].method]), found


def _check_exportable(trainable: Params, parts: Parts, leaves: Mapping[str, Any], *, word: str) -> None:
    of_biases, of_others = list(parts.biases.values()), list(parts.whole.values())
    rows = [*parts.adapters, *parts.norms, *of_biases, *of_others]
    problems = [f"not yet: the method {name!r}" for name in trainable if name not in {row.method for row in rows}]
    if (count := len({row.method for row in parts.adapters})) != 1 and not parts.norms:
        problems.append(f"not yet: {count} methods with a PEFT format in one folder; exactly one is expected")
    touched = {path for row in rows for path in row.paths}
    if "lm_head/kernel" not in leaves and tensors.EMBEDDING in touched:
        problems.append("not yet: an adapter on an embedding that is tied to the head; export the merged model instead")
    for row in parts.adapters:
        form = peft.FORMATS[row.known_as]
        if tensors.EMBEDDING in row.paths and not form.embeddings:
            problems.append(f"PEFT has no {form.peft_type} on embeddings")
        for option, value in form.only.items():
            if row.options.get(option, value) != value:
                problems.append(f"PEFT has {form.peft_type} with {option}={value!r} only, not {row.options[option]!r}")
        for option in (*form.options, *form.reads):
            if option not in form.patterns and row.options.get(option) != parts.adapters[0].options.get(option):
                problems.append(f"PEFT has one {form.options.get(option, option)} for all modules")
    problems += [f"not yet: {row.method!r} on some of the layers; export the merged model" for row in of_others if "layers" in row.options]
    if parts.biases and word == biases.NONE:
        problems.append(biases.refusal(parts.biases, parts.adapters))
    for paths in (parts.whole, {path for row in parts.norms for path in row.paths}):
        modules = {path.rpartition("/")[0] for path in paths}
        problems += [f"PEFT saves whole modules: train {p!r} too" for p in leaves if p.rpartition("/")[0] in modules and p not in paths]
    if problems:
        raise ValueError("peft: " + "; ".join(dict.fromkeys(problems)))


def _config(
    form: peft.Format, rows: list[Plan], carriers: Mapping[str, Mapping[str, int]], leaves: Mapping[str, Any], flat: Mapping[str, Any]
) -> dict[str, Any]:
    config = fields(form) | dict(form.constants)
    paths = [path for row in rows for path in row.paths]
    counts = Counter()
    for row in rows:
        counts[tuple(row.options[option] for option in form.patterns)] += len(row.paths)
    common = dict(rows[0].options) | dict(zip(form.patterns, counts.most_common(1)[0][0], strict=True))
    for option, field in form.options.items():
        if option in common:
            config[field] = to_peft(form, option, common[option])
    config |= {field: write(common) for field, write in form.writes.items()}
    for option in form.patterns:
        others = [row for row in rows if row.options[option] != common[option]]
        config[PATTERNS[option]] = {name: to_peft(form, option, row.options[option]) for row in others for name in short(row.paths, leaves)}
    for field, mark in form.lists.values():
        config[field] = short([path for path in paths if f"{path}/{mark}" in flat], leaves)
    config["target_modules"] = short(paths, leaves)
    named = set(targeted(config, owners(leaves, leaves)))
    modules = {module for found in carriers.values() for module in found}
    if modules != named and (layers := tensors.common_layers(carriers, leaves)) and "layers_to_transform" in config:
        config["layers_to_transform"] = layers
    elif modules != named:
        config["target_modules"] = sorted(modules)
    return config


def model_leaves(model: Model) -> dict[str, Any]:
    """Return the shapes of a base's leaves, by path."""
    return tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
