"""An adapter of any methods as a plain folder, for those that PEFT's folders have no place for (where they have, see `ftjax.hf.peft`).

    ftjax_adapter.json           {"format": 1, "base_model_name_or_path": "org/base", "methods": [["bottleneck", {"reduction": 16}]]}
    ftjax_adapter.safetensors    trainable/bottleneck/layers/mlp/down_proj/kernel/down, …: what was trained, by path; and frozen/…,
                                 the arrays that a method keeps for itself

The methods are names of `peft.METHODS` with their arguments, as in a config: a folder is data, and nothing in it is run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import peft, tree
from ftjax.hf import architecture
from ftjax.hf.folder import file_tensors, read_json
from ftjax.hf.write import write_adapter
from ftjax.peft.inits import CALIBRATED
from ftjax.types import Model, Params, Transform

CONFIG, WEIGHTS = "ftjax_adapter.json", "ftjax_adapter.safetensors"
FORMAT = 1
"""The version of the folder's form."""

Methods = Sequence[tuple[str, Mapping[str, Any]]]
"""`(name in peft.METHODS, its arguments)`, in the order of the chain."""


class Adapter(NamedTuple):
    """A folder that was read."""

    method: Transform
    trainable: Params
    own: Params
    """What the methods keep for themselves in the frozen tree, `{method: tree}`."""
    base_name: str
    """The model that the adapter says it belongs to."""

    def attach(self, params: Params) -> Params:
        """Return the base's parameters with the adapter on them."""
        frozen, _ = self.method.init(jax.random.key(0), params)
        return self.method.attach({**frozen, **self.own}, self.trainable)


def save_adapter(
    folder: str | Path, methods: Methods, trainable: Params, *, own: Params | None = None, base_name: str = "", tokenizer: Any = None
) -> Path:
    """Write what was trained.

    Args:
      folder: a new folder; it appears when everything in it is written.
      methods: what made the tree, in the order of `peft.chain`; arguments must be plain data.
      trainable: `{method name: tree}`.
      own: those branches of the frozen tree that the methods added.
      base_name: the hub id or path of the base model.
      tokenizer: written beside the adapter if given.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: an argument of a method is not plain data, or a LoRA started from batches; nothing is written.
    """
    for name, options in methods:
        if str(options.get("init")) in CALIBRATED:
            raise ValueError(
                f"adapter: {name} started from batches (init={options['init']!r}), which a folder has not: export the merged model."
            )
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"adapter: the arguments of {name} are not plain data, so no file can hold them: {error}") from error
    config = {"format": FORMAT, "base_model_name_or_path": base_name or None, "methods": [[name, dict(o)] for name, o in methods]}
    arrays = {path: np.asarray(array) for path, array in _flat(trainable, own or {}).items()}
    return write_adapter(Path(folder), (CONFIG, config), (WEIGHTS, arrays), tokenizer)


def load_adapter(folder: str | Path, model: Model) -> Adapter:
    """Read what `save_adapter` wrote.

    Args:
      folder: with `ftjax_adapter.json` and `ftjax_adapter.safetensors`.
      model: the base's.

    Raises:
      FileNotFoundError: one of the files is not there.
      ValueError: a file is malformed or of a newer form, a method is unknown or takes no such arguments, or the adapter was made for
        another base or RoPE; all tensors that do not fit are listed.
    """
    folder = Path(folder)
    config = _checked(read_json(folder / CONFIG), folder / CONFIG)
    architecture.check(folder, model.config)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"adapter: {folder / WEIGHTS} does not exist")
    params = jax.eval_shape(model.init, jax.random.key(0))
    try:
        method = peft.chain(*(peft.METHODS[name](**options) for name, options in config["methods"]))
        frozen, trainable = jax.eval_shape(method.init, jax.random.key(0), params)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"adapter: {folder} does not fit this base model, or its arguments are not what the method takes: {error}"
        ) from error
    expected = _flat(trainable, {name: branch for name, branch in frozen.items() if name not in params})
    found = file_tensors(folder / WEIGHTS)
    problems = [f"missing: {path} {list(expected[path].shape)}" for path in sorted(expected.keys() - found.keys())]
    problems += [f"extra: {path} {list(found[path].shape)}" for path in sorted(found.keys() - expected.keys())]
    problems += [
        f"misshapen: {path} is {found[path].dtype} {list(found[path].shape)}, expected {leaf.dtype} {list(leaf.shape)}"
        for path, leaf in expected.items()
        if path in found and (found[path].shape, found[path].dtype) != (leaf.shape, leaf.dtype)
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"adapter: {folder} does not fit this base model or is incomplete ({len(problems)} problems):\n  {listing}")
    read = tree.unflatten({path: jnp.asarray(tensor.read()) for path, tensor in found.items()})
    return Adapter(method, read.get("trainable", {}), read.get("frozen", {}), config["base_model_name_or_path"] or "")


def _flat(trainable: Params, own: Params) -> dict[str, Any]:
    return tree.flatten({"trainable": trainable, "frozen": own})


def _checked(config: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """Return the config if it is of this form, with known methods and arguments."""
    if config.get("format") != FORMAT:
        raise ValueError(f"adapter: {where} has the format {config.get('format')!r}; this version of ftjax reads {FORMAT}.")
    fields = {"format", "base_model_name_or_path", "methods"}
    if odd := sorted(config.keys() ^ fields):
        raise ValueError(f"adapter: {where} has or lacks {odd[0]!r}; expected {', '.join(sorted(fields))}.")
    methods, name = config["methods"], config["base_model_name_or_path"]
    if not isinstance(methods, list) or not methods or not all(map(_is_method, methods)) or not isinstance(name, str | None):
        raise ValueError(f"adapter: {where}: expected methods as a list of [name, arguments] and the base model's name as a text.")
    for name, options in methods:
        if name not in peft.METHODS:
            raise ValueError(f"adapter: {where}: there is no method {name!r}; nearest: {tree.nearest(name, peft.METHODS)}.")
        known = inspect.signature(peft.METHODS[name]).parameters
        if unknown := sorted(options.keys() - known.keys()):
            raise ValueError(f"adapter: {where}: {name} takes no {unknown[0]!r}; nearest: {tree.nearest(unknown[0], known)}.")
    return config


def _is_method(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)
