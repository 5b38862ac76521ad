"""What goes into a PEFT folder of an adapter on matrices: the fields of its config and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ftjax import peft, tree
from ftjax.hf import names
from ftjax.hf import peft_head as head
from ftjax.hf import peft_tensors as tensors
from ftjax.hf import peft_tokens as token_rows
from ftjax.hf.peft_config import PATTERNS, fields, owners, short, shortest_names, to_peft
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
    config, found = _on_matrices(model, {name: branch for name, branch in trainable.items() if name not in names}, others, frozen)
    config, found = head.write(config | fields, found | rows, trainable, plans)
    return config, dict(sorted(found.items()))


def _on_matrices(model: Model, trainable: Params, plans: Sequence[Plan], frozen: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of the config and the tensors of an adapter on matrices."""
    trainable, plans = peft.plain(frozen, trainable, plans)
    flat = {name: tree.flatten(branch) for name, branch in trainable.items()}
    rows = [row for row in plans if row.method in trainable]
    full_rows = [row for row in rows if all(path in flat[row.method] for path in row.paths)]
    adapter_rows = [row for row in rows if row not in full_rows and row.known_as in peft.FORMATS]
    full_paths = [path for row in full_rows for path in row.paths]
    leaves = model_leaves(model)
    _check_exportable(trainable, full_rows, adapter_rows, full_paths, leaves)
    form, own = peft.FORMATS[adapter_rows[0].known_as], tree.flatten(frozen.get(adapter_rows[0].method, {}))
    untrained = [
        f"{path}/{field}" for row in adapter_rows for path in row.paths for field, tensor in form.tensors.items() if not tensor.trained
    ]
    if absent := [field for field in (*form.shared, *untrained) if field not in own]:
        raise ValueError(f"peft: {adapter_rows[0].method} keeps {absent[0]!r} in the frozen tree, which was not given: pass frozen=frozen")
    config = _config(form, adapter_rows, full_paths, leaves, flat[adapter_rows[0].method])
    found = {tensor.key: tensors.theirs(np.asarray(own[field]), tensor.axes) for field, tensor in form.shared.items() if field in own}
    for row in adapter_rows:
        values = own | flat[row.method]
        for path in row.paths:
            arrays = {field: np.asarray(values[f"{path}/{field}"]) for field in form.tensors if f"{path}/{field}" in values}
            if (layers := row.options.get("layers")) is not None:  # what is not trained is there for all layers
                arrays = {field: array if form.tensors[field].trained else array[list(layers)] for field, array in arrays.items()}
            found |= tensors.write_leaf(path, leaves[path].shape, arrays, form, layers=layers)
    for row in full_rows:
        for path in row.paths:
            found |= tensors.write_whole(path, leaves[path].shape, np.asarray(flat[row.method][path]))
    return config, dict(sorted(found.items()))


def _check_exportable(
    trainable: Params, full_rows: list[Plan], adapter_rows: list[Plan], full_paths: list[str], leaves: Mapping[str, Any]
) -> None:
    rows = full_rows + adapter_rows
    problems = [f"not yet: the method {name!r}" for name in trainable if name not in {row.method for row in rows}]
    if (count := len({row.method for row in adapter_rows})) != 1:
        problems.append(f"not yet: {count} methods with a PEFT format in one folder; exactly one is expected")
    touched = {path for row in rows for path in row.paths}
    if "lm_head/kernel" not in leaves and tensors.EMBEDDING in touched:
        problems.append("not yet: an adapter on an embedding that is tied to the head; export the merged model instead")
    for row in adapter_rows:
        form = peft.FORMATS[row.known_as]
        if tensors.EMBEDDING in row.paths and not form.embeddings:
            problems.append(f"PEFT has no {form.peft_type} on embeddings")
        for option, value in form.only.items():
            if row.options.get(option, value) != value:
                problems.append(f"PEFT has {form.peft_type} with {option}={value!r} only, not {row.options[option]!r}")
        for option in (*form.options, *form.reads):
            if option not in form.patterns and row.options.get(option) != adapter_rows[0].options.get(option):
                problems.append(f"PEFT has one {form.options.get(option, option)} for all modules")
    problems += [f"not yet: {row.method!r} on some of the layers; export the merged model" for row in full_rows if "layers" in row.options]
    saved = {path.rpartition("/")[0] for path in full_paths}
    problems += [
        f"PEFT saves whole modules: train {path!r} too" for path in leaves if path.rpartition("/")[0] in saved and path not in full_paths
    ]
    if problems:
        raise ValueError("peft: " + "; ".join(dict.fromkeys(problems)))


def _config(
    form: peft.Format, rows: list[Plan], full_paths: list[str], leaves: Mapping[str, Any], flat: Mapping[str, Any]
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
    if (layers := rows[0].options.get("layers")) is not None:
        if "layers_to_transform" in config:
            config["layers_to_transform"] = list(layers)
        else:
            config["target_modules"] = sorted(names.modules(path, leaves[path].shape)[layer] for path in paths for layer in layers)
    config["modules_to_save"] = shortest_names(owners(full_paths, leaves), owners(leaves, leaves), str.endswith) or None
    return config


def model_leaves(model: Model) -> dict[str, Any]:
    """Return the shapes of a base's leaves, by path."""
    return tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
