"""PEFT's adapter folders out and in, for every method that declares a `Format` (see `ftjax.peft.format`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax import peft, tree
from ftjax.hf import architecture
from ftjax.hf import peft_bias as biases
from ftjax.hf import peft_head as value_head
from ftjax.hf import peft_norms as norms
from ftjax.hf import peft_prompts as prompts
from ftjax.hf import peft_tensors as tensors
from ftjax.hf import peft_tokens as token_rows
from ftjax.hf import peft_whole as whole
from ftjax.hf.folder import file_tensors, read_json
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.peft_config import check, kind_of
from ftjax.hf.peft_read import leaves_and_options, sort
from ftjax.hf.peft_write import contents, model_leaves
from ftjax.hf.write import write_adapter
from ftjax.types import Model, Params, Plan, Transform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(NamedTuple):
    """A PEFT adapter as a method and its trained tree."""

    method: Transform
    trainable: Params
    options: Mapping[str, Any]
    """The arguments that `method` was made with; of its first rule, where norms have several."""
    base_name: str
    """The model that the adapter says it belongs to."""
    kind: str
    """The method's name in `peft.METHODS`."""
    frozen: Params
    """What the file holds that is not trained: `{kind: tree}`, or nothing."""

    def join(self, params: Params) -> Params:
        """Return the frozen tree that `method.attach` takes: without what was trained in full, with the adapter's own arrays."""
        form, rows = peft.FORMATS.get(self.kind), self.method.plan(params)
        if form is not None and form.base is not None:
            params = form.base(params, [row for row in rows if row.method == self.kind])
        own = form is not None and (form.shared or not all(tensor.trained for tensor in form.tensors.values()))
        if own or any(row.known_as in whole.KINDS for row in rows):
            params, _ = self.method.init(jax.random.key(0), params)
        for name, found in self.frozen.items():
            params = {**params, name: tree.unflatten({**tree.flatten(params.get(name, {})), **tree.flatten(found)})}
        return params


def exportable(plans: Iterable[Plan]) -> bool:
    """Return whether PEFT has a method among these."""
    return any(row.known_as in {*peft.FORMATS, *peft.SOFT_PROMPTS, token_rows.KIND, norms.KIND} for row in plans)


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
    """Write an adapter that `peft.PeftModel.from_pretrained` loads.

    It is one method, with leaves trained in full, biases, rows of the embedding and a value head beside it.

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
    soft = any(row.known_as in peft.SOFT_PROMPTS for row in plans)
    config, found = prompts.write(model.config, trainable, plans) if soft else contents(model, trainable, plans, frozen or {})
    config |= {"base_model_name_or_path": base_name or None}
    return write_adapter(Path(folder), (CONFIG, config), (WEIGHTS, found), tokenizer)


def load_adapter(folder: str | Path, model: Model) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote; its `peft_type` says of which method.

    An adapter on some layers has these as its option `layers`, if they are the same of all leaves; else the other layers of a leaf hold
    what changes nothing.

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
    architecture.check(folder, model.config)
    if not (folder / WEIGHTS).is_file():
        hint = "; adapter_model.bin is a pickle, which ftjax does not open" if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"peft: {folder / WEIGHTS} does not exist{hint}")
    found = file_tensors(folder / WEIGHTS)
    if raw.get("peft_type") in prompts.KINDS:
        kind, options, trainable = prompts.read(raw, found, model.config, str(folder))
        return Adapter(peft.METHODS[kind](**options), trainable, options, raw.get("base_model_name_or_path") or "", kind, {})
    leaves = model_leaves(model)
    head, raw, found = value_head.read(raw, found, leaves[tensors.EMBEDDING].shape[-1])
    rows, config, found = token_rows.read(raw, found, leaves[tensors.EMBEDDING].shape)
    if raw.get("peft_type") == token_rows.PEFT_TYPE:
        _complain(folder, [f"extra: {name} {list(tensor.shape)}" for name, tensor in found.items()])
        name = raw.get("base_model_name_or_path") or ""
        return Adapter(rows.method(), {token_rows.KIND: rows.trainable()}, {"ids": rows.ids}, name, token_rows.KIND, {})
    trained, config, found = biases.read(config, found, leaves)
    saved, found, problems = whole.read(config, found, leaves)
    if raw.get("peft_type") == norms.PEFT_TYPE:
        adapter = _of_norms(folder, config, found, leaves, problems)
    else:
        adapter = _on_matrices(folder, check(config, str(folder / CONFIG)), found, leaves, problems)
    method, trainable = whole.beside("full", adapter.method, adapter.trainable, saved, leaves)
    method, trainable, problems = biases.beside(method, trainable, trained, leaves)
    _complain(folder, problems)
    method, trainable = value_head.beside(method, trainable, head)
    adapter = adapter._replace(method=method, trainable=trainable)
    if rows is None:
        return adapter
    return adapter._replace(
        method=peft.chain(adapter.method, rows.method()), trainable={**adapter.trainable, token_rows.KIND: rows.trainable()}
    )


def _of_norms(
    folder: Path, config: Mapping[str, Any], found: Mapping[str, LazyTensor], leaves: Mapping[str, Any], problems: list[str]
) -> Adapter:
    """Return the adapter that LN tuning's config and tensors are; there may be problems before."""
    rules, trainable, more = norms.read(config, found, leaves, str(folder / CONFIG))
    _complain(folder, problems + more)
    method = peft.chain(*(peft.norm_tuning(**options) for options in rules))
    return Adapter(method, trainable, rules[0], config.get("base_model_name_or_path") or "", norms.KIND, {})


def _on_matrices(
    folder: Path, config: Mapping[str, Any], found: Mapping[str, LazyTensor], leaves: Mapping[str, Any], problems: list[str]
) -> Adapter:
    """Return the adapter that a checked config and its tensors are; there may be problems before."""
    kind = kind_of(config)
    parts = sort(found, config, leaves)
    _complain(folder, parts.problems + problems)
    arrays, options = leaves_and_options(parts, config, leaves)
    trained = {path: jnp.asarray(value) for path, value in arrays.items() if _tensor(path, kind).trained}
    own = {path: jnp.asarray(value) for path, value in arrays.items() if not _tensor(path, kind).trained} | parts.shared
    method, trainable = peft.METHODS[kind](**options), {kind: tree.unflatten(trained)}
    _complain(folder, _not_as_fresh(method, trainable, leaves))
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
