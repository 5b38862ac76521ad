"""An adapter file, sorted: which tensor is which field of which layer of which leaf, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import peft
from ftjax.hf import names, peft_whole
from ftjax.hf import peft_tensors as tensors
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.peft_config import PATTERNS, from_peft, kind_of, short, targeted, value_of


class Parts(NamedTuple):
    """The tensors of a file, sorted."""

    layers: dict[str, dict[str, tensors.Found]]
    """`{path: {module: {field: tensor}}}`."""
    shared: dict[str, jax.Array]
    problems: list[str]


def sort(found: Mapping[str, LazyTensor], config: Mapping[str, Any], leaves: Mapping[str, Any]) -> Parts:
    """Return the tensors of a file, sorted, and all that is missing, misshapen or none of this method's."""
    form = peft.FORMATS[kind_of(config)]
    owners = {module: path for path in leaves if path.endswith("/kernel") for module in names.modules(path, leaves[path].shape)}
    roots = {tensor.key: field for field, tensor in form.shared.items()}
    by_module: dict[str, tensors.Found] = {}
    shared, problems = {}, []
    for full_name, tensor in found.items():
        name = names.canonical(full_name.removeprefix(tensors.PREFIX))
        module, key = _split(name, form, owners)
        if module:
            by_module.setdefault(module, {})[key] = tensor
        elif _is_copy(name, roots, owners):
            continue
        elif full_name in roots and len(form.shared[roots[full_name]].axes.split("->")[1]) == tensor.ndim:
            shared[roots[full_name]] = jnp.asarray(tensors.ours(tensor.read(), form.shared[roots[full_name]].axes))
        else:
            problems.append(f"extra: {full_name} {list(tensor.shape)}")
    layers, more = _assign(by_module, config, owners, leaves)
    problems += more
    problems += [f"missing: {t.key}" for field, t in form.shared.items() if not t.optional and field not in shared]
    return Parts(layers, shared, problems + peft_whole.tied(layers, leaves))


def _is_copy(name: str, roots: Mapping[str, str], owners: Mapping[str, str]) -> bool:
    """Return whether a tensor is a shared one that PEFT writes again under each module, as it does for RandLoRA."""
    module, _, last = name.rpartition(".")
    return module in owners and f"base_model.{last}" in roots


def _split(name: str, form: peft.Format, owners: Mapping[str, str]) -> tuple[str, str]:
    """Return the module and the key of a tensor's name; two empty strings if it is none of this method."""
    for module in (name.rsplit(".", parts)[0] for parts in (1, 2)):
        key = name[len(module) + 1 :]
        if module in owners and key in tensors.keys(form, owners[module]) and (form.embeddings or owners[module] != tensors.EMBEDDING):
            return module, key
    return "", ""


def _assign(by_module: Mapping[str, tensors.Found], config: Mapping[str, Any], owners: Mapping[str, str], leaves: Mapping[str, Any]):
    """Return `{path: {module: {field: tensor}}}` and what is missing or misshapen."""
    form, layers, problems = peft.FORMATS[kind_of(config)], {}, []
    for module, found in by_module.items():
        path = owners[module]
        i, o = leaves[path].shape[-2:]
        sizes = {"i": i, "o": o} | ({"r": _value(form, config, "rank", module)} if "rank" in form.options else {})
        fields_found, wrong = tensors.assign(module, found, form, path, sizes)
        layers.setdefault(path, {})[module] = fields_found
        problems += wrong
    if not by_module:
        kinds = " or ".join(tensor.key.removesuffix(".weight") for tensor in form.tensors.values())
        problems.append(f"missing: there is no {kinds} of a module of this model")
    for module in sorted(targeted(config, owners) - by_module.keys()):
        problems.append(f"missing: {tensors.PREFIX}{module}.{' and '.join(tensors.keys(form, owners[module]))}")
    return layers, problems


def _value(form: peft.Format, config: Mapping[str, Any], option: str, module: str) -> Any:
    """Return what a config says of an option for one module."""
    others = config[PATTERNS[option]] if option in form.patterns else {}
    return from_peft(form, option, value_of(others, module, config[form.options[option]]))


def leaves_and_options(parts: Parts, config: Mapping[str, Any], leaves: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return `{path/field: array}` and the method's arguments.

    Where all leaves have the adapter on the same layers, these are the method's `layers`, and what is trained is `[n, ...]`. Where the
    leaves differ, other layers hold what changes nothing.
    """
    form, arrays = peft.FORMATS[kind_of(config)], {}
    options = {option: from_peft(form, option, config[field]) for option, field in form.options.items()}
    options |= {option: read(config) for option, read in form.reads.items()}
    for option in form.patterns:
        options[PATTERNS[option]] = {}
    if on := _layers(parts, leaves):
        options["layers"] = on
    least = {axis: options[option] for axis, option in form.at_least.items()}
    for path, layers in parts.layers.items():
        shape = leaves[path].shape
        local = {module: {o: _value(form, config, o, module) for o in PATTERNS if o in form.options} for module in layers}
        first = tensors.leader(path, shape, {module: values.get("rank", 1) for module, values in local.items()}, layers)
        scales = {module: 1.0 for module in layers}
        if form.scale is not None:
            scale = {module: form.scale(values["rank"], values["alpha"], options) for module, values in local.items()}
            scales = {module: scale[module] / scale[first] for module in layers}
        for field, value in tensors.stack(path, shape, layers, form, scales, least=least).items():
            arrays[f"{path}/{field}"] = value[on] if on and form.tensors[field].trained else value
        for option in form.patterns:
            if local[first][option] != options[option]:
                options[PATTERNS[option]][path] = local[first][option]
    for option, (_, mark) in form.lists.items():
        options[option] = short([path for path in parts.layers if f"{path}/{mark}" in arrays], leaves) or None
    return arrays, {"targets": short(parts.layers, leaves), **options}


def _layers(parts: Parts, leaves: Mapping[str, Any]) -> list[int]:
    """Return the layers that have the adapter, where it is on the same ones of all leaves; none where it is on all, or they differ."""
    found = tensors.common_layers(parts.layers, leaves)
    return found if any(len(found) < len(names.modules(path, leaves[path].shape)) for path in parts.layers) else []
