"""Several methods as one: each freezes and trains what the ones before it left."""

from __future__ import annotations

import functools
from typing import Any

import jax

from ftjax.types import Params, Plan, Transform


def chain(*transforms: Transform) -> Transform:
    """Compose methods: `chain(lora(...), full(...))` is a `Transform` again.

    `init` runs from left to right, each method on the frozen tree that the one before it returned; `attach` does the same, so a later
    method wraps the leaves of an earlier one, and so does `optimizer`. The trainable tree is the union `{method name: tree}`; two methods
    of one kind need names of their own (`lora(..., name="second")`).

    Raises:
      ValueError: two methods have one name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ftjax import peft
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 4))}}, "norm": {"scale": jnp.ones(4)}}
      >>> method = peft.chain(peft.lora(["q_proj"], rank=1), peft.full("norm/scale"))
      >>> frozen, trainable = method.init(jax.random.key(0), params)
      >>> sorted(trainable)
      ['full', 'lora']
    """

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        model, own, trainable = params, {}, {}
        for index, transform in enumerate(transforms):
            frozen, new = transform.init(jax.random.fold_in(key, index), model)
            # What a method keeps in the frozen tree for itself is nothing that the next one may train.
            model = {name: branch for name, branch in frozen.items() if name in params}
            own |= {name: branch for name, branch in frozen.items() if name not in params}
            if twice := trainable.keys() & new.keys():
                raise ValueError(f"chain: two methods are named {sorted(twice)[0]!r}; give one of them another name (name=...).")
            trainable |= new
        return {**model, **own}, trainable

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        params = frozen
        for index, transform in enumerate(transforms):
            params = transform.attach(params, trainable, key=None if key is None else jax.random.fold_in(key, index))
        return params

    def plan(params: Params) -> tuple[Plan, ...]:
        return tuple(row for transform in transforms for row in transform.plan(params))

    def optimizer(rule: Any) -> Any:
        return functools.reduce(lambda rule, transform: transform.optimizer(rule), transforms, rule)

    def metrics(trainable: Params) -> dict[str, jax.Array]:
        return {name: value for transform in transforms for name, value in transform.metrics(trainable).items()}

    return Transform(init, attach, plan, optimizer, metrics)
