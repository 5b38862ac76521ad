"""PEFT's LN tuning: modules that were trained themselves, each a copy beside the base's.

model.layers.7.input_layernorm.ln_tuning_layers.weight [d]  <->  norm_tuning/layers/input_layernorm/scale [L, d]
model.norm.ln_tuning_layers.weight [d]                      <->  norm_tuning/norm/scale [d]

PEFT takes other modules for norms too, if it is told to, and so does this.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ftjax import tree
from ftjax.hf import names, peft_whole
from ftjax.hf import peft_tensors as tensors
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.peft_config import COMMON, owners, short, targeted
from ftjax.types import Params, Plan

KIND, PEFT_TYPE = "norm_tuning", "LN_TUNING"
_FIELDS: dict[str, Any] = COMMON | {"peft_type": PEFT_TYPE, "exclude_modules": None}
_UNDER = "ln_tuning_layers."


def is_of(row: Plan) -> bool:
    """Return whether a rule is of norm tuning."""
    return row.known_as == KIND


def write(rows: Iterable[Plan], trainable: Mapping[str, Params], leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config fields and the tensors of norms that were trained."""
    found, every = {}, True
    paths = [path for row in rows for path in row.paths]
    for row in rows:
        flat = tree.flatten(trainable[row.method])
        every = every and "layers" not in row.options
        for path in row.paths:
            for name, one in peft_whole.write(path, leaves[path].shape, row, np.asarray(flat[path])).items():
                found[f"{tensors.PREFIX}{_owner(name)}.{_UNDER}{name.rpartition('.')[2]}"] = one
    modules = sorted({name.removeprefix(tensors.PREFIX).partition(f".{_UNDER}")[0] for name in found})
    return _FIELDS | {"target_modules": short(paths, leaves) if every else modules}, found


def read(
    config: Mapping[str, Any], found: Mapping[str, LazyTensor], leaves: Mapping[str, Any], where: str
) -> tuple[list[dict[str, Any]], Params, list[str]]:
    """Return the arguments of the methods of a folder's norms, their trained tree, and what does not fit; with problems both are empty.

    Raises:
      ValueError: the config names no module.
    """
    if unknown := sorted(config.keys() - _FIELDS.keys()):
        log = logging.getLogger(__name__)
        log.warning("%s: ignoring fields that PEFT 0.21 does not know for %s: %s", where, PEFT_TYPE, ", ".join(unknown))
    config = _FIELDS | dict(config)
    if not isinstance(config["target_modules"], str | list) or not config["target_modules"]:
        raise ValueError(f"{where}: target_modules={config['target_modules']!r} names no module")
    parameters = {name: path for path in leaves for name in names.tensors(path, leaves[path].shape)}
    mine, shown, problems = {}, {}, []
    for full_name, tensor in found.items():
        name = names.canonical(full_name.removeprefix(tensors.PREFIX))
        plain = name.replace(f".{_UNDER}", ".")
        if plain in parameters and plain != name:
            mine[plain], shown[plain] = tensor, full_name
        else:
            problems.append(f"extra: {full_name} {list(tensor.shape)}")
    modules = targeted(config, owners(leaves, leaves)) | {_owner(name) for name in mine}
    wanted = {name for name in parameters if _owner(name) in modules}
    shown = {name: f"{tensors.PREFIX}{_owner(name)}.{_UNDER}{name.rpartition('.')[2]}" for name in wanted} | shown
    problems += peft_whole.misfits(mine, wanted, leaves, shown=shown) + peft_whole.tied({parameters[name] for name in mine}, leaves)
    if not wanted:
        problems.append(f"missing: target_modules={config['target_modules']!r} is no module of this model")
    rules, trainable = ([], {}) if problems else peft_whole.rules(KIND, mine, leaves)
    return rules, trainable, problems


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
