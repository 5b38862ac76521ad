"""PEFT's folders of soft prompts: one tensor, `prompt_embeddings`, which is what the model is fed, and the sizes it belongs to.

prompt_embeddings [n, d]            <->   prompt_tuning/prompt/embedding [n, d], times what the model scales embeddings by
prompt_embeddings [n, L · 2 · k·c]  <->   prefix_tuning/layers/slots/prefix/{key,value} [L, n, k·c]
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftjax import models, peft, tree
from ftjax.hf.lazy import LazyTensor
from ftjax.models import Config
from ftjax.peft.prefix_tuning import split
from ftjax.peft.soft_prompt import PREFIX, SoftPrompt
from ftjax.types import Params, Plan

TENSOR = "prompt_embeddings"
KINDS = {form.peft_type: kind for kind, form in peft.SOFT_PROMPTS.items()}
"""`{PEFT's type: our method}`."""
COMMON: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_transformer_submodules": 1,
}
"""Beside `peft_type`, the fields of `_sizes` and those of the type itself."""


def write(config: Config, trainable: Params, plans: Sequence[Plan]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of `adapter_config.json` and the tensors of a soft prompt, which must be all that was trained.

    Raises:
      ValueError: something else was trained too.
    """
    row = next(row for row in plans if row.known_as in peft.SOFT_PROMPTS)
    if others := [name for name in trainable if name != row.method]:
        raise ValueError(f"peft: not yet: {row.method!r} and {others[0]!r} in one folder")
    form = peft.SOFT_PROMPTS[row.known_as]
    trained = {path.removeprefix(f"{form.slot}/"): jnp.asarray(x) for path, x in tree.flatten(trainable[row.method]).items()}
    fed = {field: np.asarray(x, np.float32) for field, x in form.feed(trained).items()}
    if form.slot == PREFIX:
        tensor = np.stack([fed["key"], fed["value"]]).transpose(2, 1, 0, 3).reshape(fed["key"].shape[1], -1)
    else:
        tensor = fed["embedding"] * np.float32(_scale(config))
    options = {field: write(row.options) for field, write in form.writes.items()}
    sizes = _sizes(config, form)
    if "encoder_hidden_size" in form.defaults and options["encoder_hidden_size"] is None:
        options["encoder_hidden_size"] = sizes["token_dim"]  # as PEFT, which asks for a number even where there is no encoder
    fields = COMMON | form.defaults | {"peft_type": form.peft_type, "num_virtual_tokens": len(tensor)} | sizes | options
    return fields, {TENSOR: tensor}


def read(fields: Mapping[str, Any], found: Mapping[str, LazyTensor], config: Config, where: str) -> tuple[str, dict[str, Any], Params]:
    """Return a method of `peft.METHODS`, its arguments and its trainable tree: the virtual tokens themselves, without an encoder.

    Raises:
      ValueError: the folder is malformed, belongs to another base or holds more than a soft prompt; all problems are listed.
    """
    kind = KINDS[fields["peft_type"]]
    form = peft.SOFT_PROMPTS[kind]
    sizes = _sizes(config, form)
    known = {*COMMON, *form.defaults, *sizes, "peft_type", "num_virtual_tokens"}
    if unknown := sorted(fields.keys() - known):
        log = logging.getLogger(__name__)
        log.warning("%s: ignoring fields that PEFT 0.21 does not know for %s: %s", where, form.peft_type, ", ".join(unknown))
    count = fields.get("num_virtual_tokens")
    shape = (count, sizes["token_dim"] * (2 * config.num_hidden_layers if form.slot == PREFIX else 1))
    problems = [f"not yet: {field}={fields[field]!r}" for field in ("modules_to_save",) if fields.get(field)]
    problems += [f"{field}={fields[field]!r}, and the base has {v}" for field, v in sizes.items() if fields.get(field) not in (None, v)]
    problems += [f"extra: {name} {list(tensor.shape)}" for name, tensor in found.items() if name != TENSOR]
    if fields.get("num_transformer_submodules") not in (None, 1):
        problems.append(f"num_transformer_submodules={fields['num_transformer_submodules']!r}: a decoder has 1")
    if TENSOR not in found:
        problems.append(f"missing: {TENSOR} {list(shape)}")
    elif found[TENSOR].shape != shape:
        problems.append(f"misshapen: {TENSOR} is {list(found[TENSOR].shape)}, expected {list(shape)}")
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"peft: {where} does not fit this base model or is incomplete ({len(problems)} problems):\n  {listing}")
    options = {option: read({**form.defaults, **fields}) for option, read in form.reads.items()}
    array = found[TENSOR].read().astype(np.float32)
    fed = split(array, width=sizes["token_dim"]) if form.slot == PREFIX else {"embedding": array / _scale(config)}
    arrays = {f"{form.slot}/{field}": jnp.asarray(x, jnp.float32) for field, x in fed.items()}
    return kind, {"num_tokens": count, **options}, {kind: tree.unflatten(arrays)}


def _sizes(config: Config, form: SoftPrompt) -> dict[str, Any]:
    """Return the fields that say of which base the tokens are; PEFT gives a prefix the key/value heads."""
    heads = config.num_key_value_heads if form.slot == PREFIX else config.num_attention_heads
    width = heads * config.head_dim if form.slot == PREFIX else config.hidden_size
    return {"token_dim": width, "num_attention_heads": heads, "num_layers": config.num_hidden_layers}


def _scale(config: Config) -> float:
    """Return what the model multiplies embeddings by; PEFT's vectors come after that, ours before."""
    scale = models.FAMILIES[config.model_type].embedding_scale
    return 1.0 if scale is None else scale(config)
