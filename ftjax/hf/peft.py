"""PEFT's LoRA folders out and in.

base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight [r, i]   <->   lora/layers/self_attn/q_proj/kernel/a [L, i, r]
base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight [o, r]   <->   lora/layers/self_attn/q_proj/kernel/b [L, r, o]
base_model.model.model.norm.weight [d]   (in `modules_to_save`)         <->   full/norm/scale [d]
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import peft, tree
from ftjax.hf import names
from ftjax.hf.folder import file_tensors, read_json
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.peft_config import DEFAULTS, check, ends_at_dot, shortest_names, targeted, value_of
from ftjax.hf.write import Entry, new_folder, write_json, write_safetensors, write_tokenizer
from ftjax.types import Model, Params, Plan, Transform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")


class Adapter(NamedTuple):
    """A PEFT adapter as a method and its trained tree: `method.attach(frozen, trainable)` gives the adapted model."""

    method: Transform
    trainable: Params
    options: Mapping[str, Any]
    """The arguments of `peft.lora` that `method` was made with."""
    base_name: str
    """The model that the adapter says it belongs to."""


def save_adapter(
    folder: str | Path, model: Model, trainable: Params, plans: Iterable[Plan], *, base_name: str = "", tokenizer: Any = None
) -> Path:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads: a LoRA, and leaves trained in full as `modules_to_save`.

    Args:
      folder: a new folder; it appears when everything in it is written.
      model: the base's.
      trainable: `{method name: tree}`.
      plans: `method.plan(params)`.
      base_name: the hub id or path of the base model, which PEFT looks up.
      tokenizer: written beside the adapter if given.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: the tree holds something for which PEFT's LoRA folders have no place; nothing is written.
    """
    rows = [row for row in plans if row.method in trainable]
    lora_rows = [row for row in rows if {"rank", "alpha", "rslora"} <= row.options.keys()]
    full_paths = [path for row in rows if not row.options for path in row.paths]
    leaves = _model_leaves(model)
    _check_exportable(trainable, rows, lora_rows, full_paths, leaves)
    config = _config(lora_rows, full_paths, leaves) | {"base_model_name_or_path": base_name or None}
    tensors = dict(sorted(_tensors(trainable, rows, leaves).items()))
    with new_folder(Path(folder)) as temporary:
        write_json(temporary / CONFIG, config)
        write_safetensors(temporary / WEIGHTS, [Entry(n, x.dtype, x.shape) for n, x in tensors.items()], tensors.values())
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer)
    return Path(folder)


def _check_exportable(trainable: Params, rows: list[Plan], lora_rows: list[Plan], full_paths: list[str], leaves: Mapping[str, Any]) -> None:
    problems = [f"not yet: the method {name!r}" for name in trainable if name not in {row.method for row in rows}]
    problems += [f"not yet: the method {row.method!r}" for row in rows if row.options and row not in lora_rows]
    if len({row.method for row in lora_rows}) != 1:
        problems.append(f"not yet: {len({row.method for row in lora_rows})} LoRA methods in one folder; exactly one is expected")
    if len({row.options["rslora"] for row in lora_rows}) > 1:
        problems.append("PEFT has one use_rslora for all modules")
    if "lm_head/kernel" not in leaves:
        touched = {path for row in rows for path in row.paths}
        if "embed_tokens/kernel" in touched:
            problems.append("not yet: an adapter on an embedding that is tied to the head; export the merged model instead")
    owners = {path.rpartition("/")[0] for path in full_paths}
    problems += [
        f"PEFT saves whole modules: train {path!r} too" for path in leaves if path.rpartition("/")[0] in owners and path not in full_paths
    ]
    if problems:
        raise ValueError("peft: " + "; ".join(problems))


def _config(lora_rows: list[Plan], full_paths: list[str], leaves: Mapping[str, Any]) -> dict[str, Any]:
    sizes = Counter({(row.options["rank"], float(row.options["alpha"])): len(row.paths) for row in lora_rows})
    (rank, alpha), _ = sizes.most_common(1)[0]
    ranks, alphas = {}, {}
    for row in lora_rows:
        for name in _short(row.paths, leaves):
            if row.options["rank"] != rank:
                ranks[name] = row.options["rank"]
            if float(row.options["alpha"]) != alpha:
                alphas[name] = _number(row.options["alpha"])
    return DEFAULTS | {
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": lora_rows[0].options["rslora"],
        "lora_dropout": float(lora_rows[0].options.get("dropout", 0.0)),
        "target_modules": _short([path for row in lora_rows for path in row.paths], leaves),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": shortest_names(_owners(full_paths, leaves), _owners(leaves, leaves), str.endswith) or None,
    }


def _tensors(trainable: Params, rows: list[Plan], leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    for row in rows:
        flat = tree.flatten(trainable[row.method])
        for path in row.paths:
            if row.options:
                found |= _factors(path, np.asarray(flat[f"{path}/a"]), np.asarray(flat[f"{path}/b"]), leaves)
                continue
            value = np.asarray(flat[path])
            for layer, name in enumerate(names.tensors(path, leaves[path].shape)):
                one = value[layer] if names.is_stacked(path) else value
                found[_PREFIX + name] = one.T if names.is_transposed(path) else one
    return found


def _factors(path: str, a: np.ndarray, b: np.ndarray, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    kind = "lora_embedding_{}" if path == "embed_tokens/kernel" else "lora_{}.weight"
    a, b = (a, b) if names.is_stacked(path) else (a[None], b[None])
    found = {}
    for layer, module in enumerate(names.modules(path, leaves[path].shape)):
        found[f"{_PREFIX}{module}.{kind.format('A')}"] = a[layer].T
        found[f"{_PREFIX}{module}.{kind.format('B')}"] = b[layer].T
    return found


def load_adapter(folder: str | Path, model: Model) -> Adapter:
    """Read a LoRA adapter that PEFT or `save_adapter` wrote.

    Layers of one stacked leaf may have ranks of their own: they are padded with zeros to the largest. Such a leaf has one scale, that of
    its first layer of the largest rank, and `b` of a layer with another scale is multiplied by the quotient: exact if that is a power
    of two, else rounded once in float32.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      model: the base's.

    Raises:
      FileNotFoundError: one of the files is not there.
      ValueError: a file is malformed, the adapter was made for another base, or it uses what is not implemented; all problems are listed.
    """
    folder = Path(folder)
    config = check(read_json(folder / CONFIG), str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        hint = "; adapter_model.bin is a pickle, which ftjax does not open" if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"peft: {folder / WEIGHTS} does not exist{hint}")
    leaves = _model_leaves(model)
    factors, saved, problems = _sort(file_tensors(folder / WEIGHTS), config, leaves)
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"peft: {folder} does not fit this base model or is incomplete ({len(problems)} problems):\n  {listing}")
    stacks, ranks, alphas = {}, {}, {}
    for path, layers in factors.items():
        stacks[path], ranks[path], alphas[path] = _stack(path, layers, config, leaves)
    options = {
        "targets": _short(factors, leaves),
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "rslora": config["use_rslora"],
        "dropout": float(config["lora_dropout"]),
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != config["r"]},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != config["lora_alpha"]},
    }
    method, trainable = peft.lora(**options), {"lora": tree.unflatten(stacks)}
    if saved:
        method = peft.chain(method, peft.full("|".join(map(re.escape, saved))))
        trainable["full"] = tree.unflatten({path: _full(path, tensors) for path, tensors in saved.items()})
    return Adapter(method, trainable, options, config["base_model_name_or_path"] or "")


def _sort(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], leaves: Mapping[str, Any]):
    """Return `{path: {layer: {"A": tensor, "B": tensor}}}`, `{path: [tensor of each layer]}` and what is wrong."""
    owners = {module: path for path in leaves if path.endswith("/kernel") for module in names.modules(path, leaves[path].shape)}
    parameters = {name: path for path in leaves for name in names.tensors(path, leaves[path].shape)}
    factors: dict[str, dict[str, dict[str, LazyTensor]]] = {}
    saved: dict[str, dict[str, LazyTensor]] = {}
    problems = []
    for full_name, tensor in tensors.items():
        name = names.canonical(full_name.removeprefix(_PREFIX))
        factor = _FACTOR.fullmatch(name)
        if factor and factor[1] in owners:
            factors.setdefault(owners[factor[1]], {}).setdefault(factor[1], {})[factor[2] or factor[3]] = tensor
        elif name in parameters and config["modules_to_save"]:
            saved.setdefault(parameters[name], {})[name] = tensor
        else:
            problems.append(f"extra: {full_name} {list(tensor.shape)}")
    if not factors:
        problems.append("missing: there is no lora_A or lora_B of a module of this model")
    for path, layers in factors.items():
        for module, pair in layers.items():
            problems += _factor_problems(module, pair, value_of(config["rank_pattern"], module, config["r"]), path, leaves)
    absent = targeted(config, owners) - {module for layers in factors.values() for module in layers}
    problems += [f"missing: {_PREFIX}{module}.lora_A.weight and lora_B.weight" for module in sorted(absent)]
    for path, found in saved.items():
        expected = names.leaf_shape(path, leaves[path].shape)
        wanted = names.tensors(path, leaves[path].shape)
        problems += [f"missing: {_PREFIX}{name} {list(expected)}" for name in wanted if name not in found]
        problems += [
            f"misshapen: {_PREFIX}{n} is {list(t.shape)}, expected {list(expected)}" for n, t in found.items() if t.shape != expected
        ]
    if "lm_head/kernel" not in leaves and "embed_tokens/kernel" in {*factors, *saved}:
        problems.append("not yet: an adapter on an embedding that is tied to the head")
    return factors, {path: [found[name] for name in sorted(found, key=_layer_number)] for path, found in saved.items()}, problems


def _factor_problems(module: str, pair: Mapping[str, LazyTensor], rank: int, path: str, leaves: Mapping[str, Any]) -> list[str]:
    i, o = leaves[path].shape[-2:]
    problems = []
    for side, expected in (("A", (rank, i)), ("B", (o, rank))):
        if side not in pair:
            problems.append(f"missing: {_PREFIX}{module}.lora_{side}.weight {list(expected)}")
        elif pair[side].shape != expected:
            problems.append(f"misshapen: {_PREFIX}{module}.lora_{side}.weight is {list(pair[side].shape)}, expected {list(expected)}")
    return problems


def _stack(path: str, layers: Mapping[str, Mapping[str, LazyTensor]], config: Mapping[str, Any], leaves: Mapping[str, Any]):
    """Return `({"a", "b"}, rank, alpha)` of one leaf from the factors of its layers; a layer without any gets zeros."""
    i, o = leaves[path].shape[-2:]
    modules = names.modules(path, leaves[path].shape)
    alphas = {module: float(value_of(config["alpha_pattern"], module, config["lora_alpha"])) for module in layers}
    ranks = {module: pair["A"].shape[0] for module, pair in layers.items()}
    first = max((module for module in modules if module in layers), key=lambda module: ranks[module])
    rank = ranks[first]

    def scale(module: str) -> float:
        return alphas[module] / (math.sqrt(ranks[module]) if config["use_rslora"] else ranks[module])

    a, b = np.zeros((len(modules), i, rank), np.float32), np.zeros((len(modules), rank, o), np.float32)
    for layer, module in enumerate(modules):
        if module in layers:
            a[layer, :, : ranks[module]] = layers[module]["A"].read().T
            b[layer, : ranks[module]] = layers[module]["B"].read().T
            if scale(module) != scale(first):
                b[layer] *= np.float32(scale(module) / scale(first))
    a, b = (a, b) if names.is_stacked(path) else (a[0], b[0])
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}, rank, alphas[first]


def _full(path: str, tensors: list[LazyTensor]) -> jax.Array:
    values = [tensor.read().astype(np.float32) for tensor in tensors]
    values = [value.T for value in values] if names.is_transposed(path) else values
    return jnp.asarray(np.stack(values) if names.is_stacked(path) else values[0])


def _model_leaves(model: Model) -> dict[str, Any]:
    return tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))


def _layer_number(name: str) -> int:
    layer = names.path(name)[1]
    return 0 if layer is None else layer


def _short(paths: Iterable[str], leaves: Mapping[str, Any]) -> list[str]:
    return shortest_names(_owners(paths, leaves), _owners(leaves, leaves), ends_at_dot)


def _owners(paths: Iterable[str], leaves: Mapping[str, Any]) -> set[str]:
    return {module for path in paths for module in names.modules(path, leaves[path].shape)}


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
