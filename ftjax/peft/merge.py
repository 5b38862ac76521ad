"""Fold a method into the weights it rides on."""

from __future__ import annotations

from ftjax import tree, weights
from ftjax.peft.soft_prompt import check_no_virtual_tokens
from ftjax.types import Params, Transform


def merge(method: Transform, frozen: Params, trainable: Params) -> Params:
    """Return the dense tree that gives the same model without the method: `materialize` of every attached leaf.

    Exact up to one rounding to the base's dtype; a bfloat16 base therefore changes the logits by about its precision.

    Raises:
      ValueError: the method adds virtual tokens, which are no part of any weight.
    """
    params = method.attach(frozen, trainable)
    check_no_virtual_tokens(tree.flatten(params), "merge")
    return weights.dense(params)
