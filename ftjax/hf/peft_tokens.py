"""PEFT's trainable tokens: rows of the embedding that were trained, in a folder of their own or beside a LoRA.

model.embed_tokens.trainable_tokens_delta [n, d]                <->   tokens/embed_tokens/kernel/rows [n, d]
model.embed_tokens.token_adapter.trainable_tokens_delta [n, d]  <->   the same, beside a LoRA with trainable_token_indices

The rows are in the order of the ids in the config; ours ascend. They replace those of the base, whatever PEFT's name for them says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ftjax import peft, tree
from ftjax.hf import peft_tensors as tensors
from ftjax.hf.lazy import LazyTensor
from ftjax.types import Params, Plan, Transform

KIND, PEFT_TYPE = "tokens", "TRAINABLE_TOKENS"
ALONE, BESIDE = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"
FIELD = "trainable_token_indices"
"""Of a LoRA's config; a folder of its own has `token_indices`."""
_MODULE, _HEAD = "model.embed_tokens", "lm_head"
_FIELDS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": PEFT_TYPE,
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "target_modules": _MODULE,
    "token_indices": [],
    "init_weights": True,
}


class Rows(NamedTuple):
    """Trained rows that were read."""

    ids: tuple[int, ...]
    """Ascending."""
    rows: np.ndarray
    """float32 `[n, d]`."""

    def method(self) -> Transform:
        return peft.tokens(self.ids)

    def trainable(self) -> Params:
        return tree.unflatten({f"{tensors.EMBEDDING}/rows": jnp.asarray(self.rows)})


def is_of(row: Plan) -> bool:
    """Return whether a rule is of trainable tokens."""
    return row.known_as == KIND


def write(trainable: Params, plans: Iterable[Plan], *, beside: str | None, tied: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config fields and the tensors of the rows in a trainable tree; nothing where there are none.

    Args:
      trainable: `{method name: tree}`.
      plans: of all methods.
      beside: PEFT's type of the method that shares the folder; None: they stand alone.
      tied: whether the head is the embedding, which a folder of their own then says twice.

    Raises:
      ValueError: two rules of tokens, another matrix than the embedding, or a neighbour that is no LoRA.
    """
    rows = [row for row in plans if is_of(row)]
    if not rows:
        return {}, {}
    row = rows[0]
    if len(rows) > 1 or row.paths != (tensors.EMBEDDING,):
        raise ValueError(f"peft: trainable tokens are rows of {tensors.EMBEDDING!r} by one rule, not of {', '.join(row.paths)}.")
    if beside not in (None, "LORA"):
        raise ValueError(f"peft: PEFT has trainable tokens beside a LoRA only, not beside {beside}.")
    array = np.asarray(tree.flatten(trainable[row.method])[f"{tensors.EMBEDDING}/rows"])
    ids = list(row.options["ids"])
    if beside:
        return {FIELD: ids}, {f"{tensors.PREFIX}{_MODULE}.{BESIDE}": array}
    modules = (_MODULE, _HEAD) if tied else (_MODULE,)
    return _FIELDS | {"token_indices": ids}, {f"{tensors.PREFIX}{module}.{ALONE}": array for module in modules}


def read(
    config: Mapping[str, Any], found: Mapping[str, LazyTensor], embedding: Sequence[int]
) -> tuple[Rows | None, dict[str, Any], dict[str, LazyTensor]]:
    """Return the trained rows of a folder, if it has some, and what of its config and tensors is not about them.

    Args:
      config: of the folder.
      found: its tensors.
      embedding: the base's `[v, d]`.

    Raises:
      ValueError: the ids are no ids of this vocabulary or of another module, or the tensor is missing or misshapen.
    """
    alone = config.get("peft_type") == PEFT_TYPE
    given = config.get("token_indices" if alone else FIELD)
    if not given and not alone:
        return None, dict(config), dict(found)
    ids = given.get("embed_tokens") if isinstance(given, dict) and given.keys() == {"embed_tokens"} else given
    target = config.get("target_modules") if alone else None
    if target not in (None, _MODULE, "embed_tokens", [_MODULE], ["embed_tokens"]):
        raise ValueError(f"peft: not yet: trainable tokens of {target!r}: only of the embedding, embed_tokens.")
    if not isinstance(ids, list) or not ids or len(set(ids)) < len(ids) or not all(_is_id(id, embedding[0]) for id in ids):
        raise ValueError(f"peft: trainable tokens: expected ids from 0 to {embedding[0] - 1} of embed_tokens, each once, not {given!r}.")
    key = ALONE if alone else BESIDE
    name, copy = (f"{tensors.PREFIX}{module}.{key}" for module in (_MODULE, _HEAD))
    shape = (len(ids), embedding[1])
    if name not in found or found[name].shape != shape:
        what = f"is {list(found[name].shape)}" if name in found else "is missing"
        raise ValueError(f"peft: {name} {what}, expected {list(shape)}: the folder does not fit this base model or is incomplete.")
    order = np.argsort(ids)
    rows = Rows(tuple(np.asarray(ids)[order].tolist()), found[name].read().astype(np.float32)[order])
    rest = {other: tensor for other, tensor in found.items() if other not in (name, copy)}
    return rows, {**config, **({} if alone else {FIELD: None})}, rest


def _is_id(value: Any, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size
