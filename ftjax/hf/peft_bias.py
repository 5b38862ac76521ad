"""Biases that were trained beside an adapter on matrices: PEFT's `bias="all"` and `bias="lora_only"`.

model.layers.7.self_attn.q_proj.base_layer.bias [o]  (its matrix has an adapter)  <->  bitfit/layers/self_attn/q_proj/bias [L, o]
model.layers.7.self_attn.k_proj.bias [o]             (its matrix has none)        <->  bitfit/layers/self_attn/k_proj/bias [L, o]

"all" are those of the model, "lora_only" (of OFT "oft_only", and so on) those of the matrices that have an adapter. PEFT has no other sets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax import peft, tree
from ftjax.hf import names, peft_whole
from ftjax.hf import peft_tensors as tensors
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.peft_config import kind_of
from ftjax.types import Params, Plan, Transform

FIELD, ALL, NONE = "bias", "all", "none"
_ONLY = {"ADALORA": "lora_only", "MISS": "MiSS_only"}
"""By PEFT's type, where it is not the type in lower case."""
_UNDER = ".base_layer.bias"
_COPIES = (".original_module.bias", ".modules_to_save.bias")
"""What PEFT writes once more with "all", of modules that are saved whole."""


class Biases(NamedTuple):
    """Trained biases that were read."""

    which: str
    """PEFT's word for the set."""
    found: dict[str, LazyTensor]
    """By the name in the model."""
    shown: dict[str, str]
    """The names in the file."""


def alone(rows: Iterable[Plan], leaves: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the biases among leaves that were trained themselves, without those whose matrix was trained so too, and their rules."""
    by_path = {path: row for row in rows for path in row.paths}
    return {path: row for path, row in by_path.items() if _is_bias(path) and _matrix(path) not in by_path}


def which(alone: Mapping[str, Plan], whole: Collection[str], modules: Collection[str], form: peft.Format, leaves: Mapping[str, Any]) -> str:
    """Return PEFT's word for a set of biases; "none" for one that it has no word for, too.

    Args:
      alone: the biases, and their rules.
      whole: other leaves that were trained themselves.
      modules: those that have an adapter.
      form: the adapter's.
      leaves: the base's.
    """
    here = {name for path, row in alone.items() for name in peft_whole.chosen(path, leaves[path].shape, row)}
    every = _every(leaves)
    if not here or FIELD not in form.defaults:
        return NONE
    if here | {name for path in whole for name in names.tensors(path, leaves[path].shape)} >= every:
        return ALL
    return _ONLY.get(form.peft_type, f"{form.peft_type.lower()}_only") if here == _of(modules, every) else NONE


def write(
    alone: Mapping[str, Plan], trainable: Mapping[str, Params], modules: Collection[str], leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the tensors of biases; `modules` have an adapter."""
    found = {}
    for path, row in alone.items():
        array = np.asarray(tree.flatten(trainable[row.method])[path])
        for name, one in peft_whole.write(path, leaves[path].shape, row, array).items():
            module = name.removesuffix(".bias")
            found[f"{tensors.PREFIX}{module}{_UNDER if module in modules else '.bias'}"] = one
    return found


def refusal(alone: Mapping[str, Plan], adapters: Sequence[Plan]) -> str:
    """Return what is wrong with a set of biases for which there is no word, and what to do."""
    path = next(iter(alone))
    if adapters and FIELD in peft.FORMATS[adapters[0].known_as].defaults:
        return (
            f"PEFT saves whole modules: train {_matrix(path)!r} too, or all biases of the model, as bitfit() does, or exactly those of the "
            "matrices with an adapter"
        )
    beside = peft.FORMATS[adapters[0].known_as].peft_type if adapters else "norms alone"
    return f"PEFT has no biases beside {beside}, and saves whole modules: train {_matrix(path)!r} too"


def read(
    config: Mapping[str, Any], found: Mapping[str, LazyTensor], leaves: Mapping[str, Any]
) -> tuple[Biases | None, dict[str, Any], dict[str, LazyTensor]]:
    """Return the trained biases of a folder, if it has some, and what of its config and tensors is not about them."""
    kind, value = kind_of(config), config.get(FIELD)
    asked = isinstance(value, str) and (value == ALL or value.endswith("_only"))
    if not asked or kind is None or FIELD not in peft.FORMATS[kind].defaults:
        return None, dict(config), dict(found)
    every, mine, shown, rest = _every(leaves), {}, {}, {}
    for full_name, tensor in found.items():
        name = names.canonical(full_name.removeprefix(tensors.PREFIX))
        plain = f"{name.removesuffix(_UNDER)}.bias" if name.endswith(_UNDER) else name
        if name.endswith(_COPIES):
            continue
        if plain in every and f"{full_name.removesuffix('.bias')}.weight" not in found:
            mine[plain], shown[plain] = tensor, full_name
        else:
            rest[full_name] = tensor
    return Biases(value, mine, shown), {**config, FIELD: NONE}, rest


def beside(method: Transform, trainable: Params, biases: Biases | None, leaves: Mapping[str, Any]) -> tuple[Transform, Params, list[str]]:
    """Return a method and its trained tree with biases, or as they are where there are none, and what does not fit."""
    if biases is None:
        return method, trainable, []
    rows = [row for row in method.plan(tree.unflatten(leaves)) if row.known_as in peft.FORMATS]
    every = _every(leaves)
    whole = {name for path in tree.flatten(trainable.get("full", {})) for name in names.tensors(path, leaves[path].shape)}
    wanted = every - whole if biases.which == ALL else _of(adapted(rows, leaves), every)
    if problems := peft_whole.misfits(biases.found, wanted, leaves, shown=biases.shown):
        return method, trainable, problems
    return *peft_whole.beside("bitfit", method, trainable, biases.found, leaves), []


def adapted(rows: Sequence[Plan], leaves: Mapping[str, Any]) -> set[str]:
    """Return the modules that these rules put an adapter on."""
    found = set()
    for row in rows:
        for path in row.paths:
            modules = names.modules(path, leaves[path].shape)
            found |= {modules[layer] for layer in row.options["layers"]} if "layers" in row.options else set(modules)
    return found


def _every(leaves: Mapping[str, Any]) -> set[str]:
    return {name for path in leaves if _is_bias(path) for name in names.tensors(path, leaves[path].shape)}


def _of(modules: Iterable[str], biases: Collection[str]) -> set[str]:
    return {f"{module}.bias" for module in modules} & set(biases)


def _is_bias(path: str) -> bool:
    return path.endswith("/bias")


def _matrix(path: str) -> str:
    return f"{path.removesuffix('bias')}kernel"
