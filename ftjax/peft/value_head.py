"""A value head: one linear unit on the last hidden states, for the value of a state or the reward of a text."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.types import VALUE_HEAD, Params, Plan, Transform


def value_head(*, init: str = "zeros", bias: bool = True, reads: tree.Filter = "norm/scale", name: str = "value_head") -> Transform:
    """Train a linear unit on the hidden states that the output head reads.

    v_t = h_t w + b,   float32

    `scoring.score(…, outputs=("values",))` returns it at every token (see `ftjax.types.Scores.values`). On a shared trunk it is the critic
    of PPO (Schulman et al., 2017, arXiv 1707.06347, section 5), and at the last token the reward model of Stiennon et al., 2020, arXiv
    2009.01325, appendix B.1, whose head starts normal. Its gradient reaches whatever else is trained: `chain(lora(...), value_head())`. A
    model that has a head already (a Hugging Face `…ForSequenceClassification` folder of one label) starts from it; that class has no bias,
    so one that moved cannot be exported.

    Args:
      init: how w starts: "zeros", or "normal" with the deviation 1 / √(d + 1).
      bias: whether there is a b; it starts at 0.
      reads: a leaf (see `ftjax.tree`) whose last axis is the width d of the hidden states; another than the final norm in a bridged module.
      name: the key in the trainable tree.

    Raises:
      ValueError: there is no such leaf, or no such start.

    Example:
      >>> params = {"norm": {"scale": jnp.ones(4)}}
      >>> frozen, trainable = value_head().init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'value_head/bias': (1,), 'value_head/kernel': (4, 1)}
    """
    if init not in ("zeros", "normal"):
        raise ValueError(f"{name}: init is 'zeros' or 'normal', not {init!r}.")

    def paths(params: Params) -> tuple[str, ...]:
        return tree.matches(params, reads, who=name)[:1]

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        d = tree.flatten(params)[paths(params)[0]].shape[-1]
        deviation = 0.0 if init == "zeros" else 1 / math.sqrt(d + 1)
        fresh = {"kernel": deviation * jax.random.normal(key, (d, 1), jnp.float32)} | ({"bias": jnp.zeros((1,))} if bias else {})
        there = params.get(VALUE_HEAD, {})  # copied, for the state is donated and `params` must outlive it
        return params, {name: fresh | {field: jnp.array(there[field], jnp.float32, copy=True) for field in fresh if field in there}}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        return {**frozen, VALUE_HEAD: trainable[name]}

    def plan(params: Params) -> tuple[Plan, ...]:
        return (Plan(name, tree.describe(reads), paths(params), {"init": init, "bias": bias}),)

    return Transform(init_fn, attach, plan)
