"""PEFT's adapter folders out and in, for every method that declares a `Format` (see `ftjax.peft.format`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import peft, tree
from ftjax.hf import architecture, names
from ftjax.hf import peft_prompts as prompts
from ftjax.hf import peft_tensors as tensors
from ftjax.hf.folder import file_tensors, read_json
from ftjax.hf.peft_config import PATTERNS, check, fields, kind_of, owners, short, shortest_names, to_peft
from ftjax.hf.peft_read import leaves_and_options, sort
from ftjax.hf.write import Entry, new_folder, write_json, write_safetensors, write_tokenizer
from ftjax.types import Model, Params, Plan, Transform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(NamedTuple):
    """A PEFT adapter as a method and its trained tree."""

    method: Transform
    trainable: Params
    options: Mapping[str, Any]
    """The arguments that `method` was made with."""
    base_name: str
    """The model that the adapter says it belongs to."""
    kind: str
    """The method's name in `peft.METHODS`."""
    frozen: Params
    """What the file holds that is not trained: `{kind: tree}`, or nothing."""

    def join(self, params: Params) -> Params:
        """Return the frozen tree that `method.attach` takes: without what was trained in full, with the adapter's own arrays."""
        if self.kind in peft.SOFT_PROMPTS:
            return params
        form = peft.FORMATS[self.kind]
        if form.base is not None:
            params = form.base(params, [row for row in self.method.plan(params) if row.method == self.kind])
        if "full" in self.trainable or form.shared or not all(tensor.trained for tensor in form.tensors.values()):
            params, _ = self.method.init(jax.random.key(0), params)
        for name, found in self.frozen.items():
            params = {**params, name: tree.unflatten({**tree.flatten(params.get(name, {})), **tree.flatten(found)})}
        return params


def exportable(plans: Iterable[Plan]) -> bool:
    """Return whether PEFT has a method among these."""
    return any(_kind(row) in peft.FORMATS or _kind(row) in peft.SOFT_PROMPTS for row in plans)


def save_adapter(
    folder: str | Path,
    model: Model,
    trainable: Params,
    plans: Iterable[Plan],
    *,
    base_name: str = "",
    tokenizer: Any = None,
    frozen: Params | None = None,
) -> Path:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads: one method, and leaves trained in full as `modules_to_save`.

    Args:
      folder: a new folder; it appears when everything in it is written.
      model: the base's.
      trainable: `{method name: tree}`.
      plans: `method.plan(params)`.
      base_name: the hub id or path of the base model, which PEFT looks up.
      tokenizer: written beside the adapter if given.
      frozen: the frozen tree, of which a method that keeps arrays of its own there needs them.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: the tree holds something for which PEFT's folders have no place; nothing is written.
    """
    plans = tuple(plans)
    soft = any(_kind(row) in peft.SOFT_PROMPTS for row in plans)
    config, found = prompts.write(model.config, trainable, plans) if soft else _contents(model, trainable, plans, frozen or {})
    config |= {"base_model_name_or_path": base_name or None}
    with new_folder(Path(folder)) as temporary:
        write_json(temporary / CONFIG, config)
        write_safetensors(temporary / WEIGHTS, [Entry(n, x.dtype, x.shape) for n, x in found.items()], found.values())
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer)
    return Path(folder)


def _contents(model: Model, trainable: Params, plans: Sequence[Plan], frozen: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of the config and the tensors of an adapter on matrices."""
    trainable, plans = peft.plain(frozen, trainable, plans)
    flat = {name: tree.flatten(branch) for name, branch in trainable.items()}
    rows = [row for row in plans if row.method in trainable]
    full_rows = [row for row in rows if all(path in flat[row.method] for path in row.paths)]
    adapter_rows = [row for row in rows if row not in full_rows and _kind(row) in peft.FORMATS]
    full_paths = [path for row in full_rows for path in row.paths]
    leaves = _model_leaves(model)
    _check_exportable(trainable, full_rows, adapter_rows, full_paths, leaves)
    form, own = peft.FORMATS[_kind(adapter_rows[0])], tree.flatten(frozen.get(adapter_rows[0].method, {}))
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


def _kind(row: Plan) -> str:
    return row.kind or row.method


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
        form = peft.FORMATS[_kind(row)]
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


def load_adapter(folder: str | Path, model: Model) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote; its `peft_type` says of which method.

    Layers of one stacked leaf may have ranks of their own where zeros leave the method's product as it is: they are padded to the largest.
    Such a leaf has one scale, that of its first layer of the largest rank, and a factor of a layer with another scale is multiplied by the
    quotient: exact if that is a power of two, else rounded once in float32.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      model: the base's.

    Raises:
      FileNotFoundError: one of the files is not there.
      ValueError: a file is malformed, the adapter was made for another base or RoPE, or it uses what is not implemented; all problems are
        listed.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG)
    soft = raw.get("peft_type") in prompts.KINDS
    config = raw if soft else check(raw, str(folder / CONFIG))
    architecture.check(folder, model.config)
    if not (folder / WEIGHTS).is_file():
        hint = "; adapter_model.bin is a pickle, which ftjax does not open" if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"peft: {folder / WEIGHTS} does not exist{hint}")
    if soft:
        kind, options, trainable = prompts.read(raw, file_tensors(folder / WEIGHTS), model.config, str(folder))
        return Adapter(peft.METHODS[kind](**options), trainable, options, raw.get("base_model_name_or_path") or "", kind, {})
    leaves = _model_leaves(model)
    kind = kind_of(config)
    parts = sort(file_tensors(folder / WEIGHTS), config, leaves)
    _complain(folder, parts.problems)
    arrays, options = leaves_and_options(parts, config, leaves)
    trained = {path: jnp.asarray(value) for path, value in arrays.items() if _tensor(path, kind).trained}
    own = {path: jnp.asarray(value) for path, value in arrays.items() if not _tensor(path, kind).trained} | parts.shared
    method, trainable = peft.METHODS[kind](**options), {kind: tree.unflatten(trained)}
    _complain(folder, _not_as_fresh(method, trainable, leaves))
    if parts.saved:
        method = peft.chain(method, peft.full("|".join(map(re.escape, parts.saved))))
        trainable["full"] = tree.unflatten({path: jnp.asarray(tensors.read_whole(path, found)) for path, found in parts.saved.items()})
    frozen = {kind: tree.unflatten(own)} if own else {}
    return Adapter(method, trainable, options, config["base_model_name_or_path"] or "", kind, frozen)


def _complain(folder: Path, problems: list[str]) -> None:
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"peft: {folder} does not fit this base model or is incomplete ({len(problems)} problems):\n  {listing}")


def _tensor(path: str, kind: str) -> peft.Tensor:
    return peft.FORMATS[kind].tensors[path.rpartition("/")[2]]


def _not_as_fresh(method: Transform, trainable: Params, leaves: Mapping[str, Any]) -> list[str]:
    """Return where a trainable tree differs in shape from the one that the method would start with."""
    fresh = tree.flatten(jax.eval_shape(method.init, jax.random.key(0), tree.unflatten(leaves))[1])
    found = tree.flatten(trainable)
    problems = [f"missing: {path} {list(leaf.shape)}" for path, leaf in fresh.items() if path not in found]
    problems += [f"extra: {path} {list(leaf.shape)}" for path, leaf in found.items() if path not in fresh]
    return problems + [
        f"misshapen: {path} is {list(leaf.shape)}, expected {list(fresh[path].shape)}"
        for path, leaf in found.items()
        if path in fresh and fresh[path].shape != leaf.shape
    ]


def _model_leaves(model: Model) -> dict[str, Any]:
    return tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
