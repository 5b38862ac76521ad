"""A value head in PEFT's folder: an adapter of the task SEQ_CLS, for a classifier of one label, whose head is saved whole.

base_model.model.score.weight [1, d]   (in `modules_to_save`)   <->   value_head/kernel [d, 1]

The base of such a folder is `AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)`; its own head is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftjax import peft
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.peft_tensors import PREFIX
from ftjax.types import VALUE_HEAD, Params, Plan, Transform

KIND, TASK = "value_head", "SEQ_CLS"
_NAME = f"{PREFIX}score.weight"
_MODULES = ["classifier", "score"]
"""What PEFT adds to `modules_to_save` for this task, whichever of the two the model has."""


def is_of(row: Plan) -> bool:
    """Return whether a rule is of a value head."""
    return row.known_as == KIND


def write(
    config: dict[str, Any], found: dict[str, np.ndarray], trainable: Params, plans: Iterable[Plan]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return config and tensors of an adapter with the value head in them, or as they are where there is none.

    Raises:
      ValueError: the head has a bias.
    """
    heads = [trainable[row.method] for row in plans if is_of(row)]
    if not heads:
        return config, found
    if "bias" in heads[0] and np.any(np.asarray(heads[0]["bias"])):
        raise ValueError("peft: the value head has a bias, which Hugging Face's classifiers have not: train it with bias=False.")
    saved = [name for name in config["modules_to_save"] or [] if name not in _MODULES]
    return config | {"task_type": TASK, "modules_to_save": [*saved, *_MODULES]}, {**found, _NAME: np.asarray(heads[0]["kernel"]).T}


def read(
    config: Mapping[str, Any], found: Mapping[str, LazyTensor], width: int
) -> tuple[Params | None, dict[str, Any], dict[str, LazyTensor]]:
    """Return the trained head of a folder, if it has one, and what of its config and tensors is not about it.

    Args:
      config: of the folder.
      found: its tensors.
      width: of the hidden states.

    Raises:
      ValueError: the task is classification, and the head is missing or is not of one label.
    """
    if config.get("task_type") != TASK:
        return None, dict(config), dict(found)
    if _NAME not in found or found[_NAME].shape != (1, width):
        what = f"is {list(found[_NAME].shape)}" if _NAME in found else "is missing"
        raise ValueError(f"peft: {_NAME} {what}, expected {[1, width]}: of classifiers those of one label are read, for this base model.")
    saved = [name for name in config.get("modules_to_save") or [] if name not in _MODULES]
    rest = {name: tensor for name, tensor in found.items() if name != _NAME}
    head = {"kernel": jnp.asarray(found[_NAME].read().astype(np.float32).T)}
    return head, {**config, "task_type": "CAUSAL_LM", "modules_to_save": saved or None}, rest


def beside(method: Transform, trainable: Params, head: Params | None) -> tuple[Transform, Params]:
    """Return a method and its trained tree with a head, or as they are where there is none."""
    if head is None:
        return method, trainable
    return peft.chain(method, peft.value_head(bias=False)), {**trainable, VALUE_HEAD: head}
