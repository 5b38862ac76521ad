"""What soft prompts share: a few trained arrays become virtual tokens in a slot that the model declares empty (see `ftjax.models.virtual`).

A method file brings its maths alone: `make`, the arrays that it starts from, and `feed`, what the model is given of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.types import Params, Plan, Transform
from ftjax.weights import Leaf

PROMPT = "prompt"
"""The slot of `embedding` [n, d]."""
PREFIX = "layers/slots/prefix"
"""The slot of `key` and `value` [l, n, k·c]."""

Fields = Mapping[str, jax.Array]
Make = Callable[[jax.Array, Leaf], Fields]
"""`(key, the leaf that is read) -> {field: array}`: what is trained, in float32, as it starts."""
Feed = Callable[[Fields], Fields]
"""From what is trained to what stands in the slot, in float32."""


class SoftPrompt(NamedTuple):
    """A soft prompt in PEFT's terms: a folder with one tensor, `prompt_embeddings`, which is what the model is fed."""

    peft_type: str
    slot: str
    """`PROMPT`: the tensor is `embedding`; `PREFIX`: `[n, l · 2 · k·c]`, the key and the value of each layer side by side."""
    feed: Feed
    defaults: Mapping[str, Any]
    """The config fields of this type beyond those that all soft prompts have; they say how it was trained."""
    writes: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {}
    """`{config field: function of our options}` where it is not the default."""
    reads: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {}
    """`{our option: function of the config}` beside the number of tokens."""


def soft_prompt(make: Make, feed: Feed, *, name: str, kind: str, slot: str, reads: str, num_tokens: int, options: Mapping) -> Transform:
    """Return the method that trains `make`'s arrays and puts `feed` of them into the slot, in the dtype of the leaf at `reads`.

    Raises:
      ValueError: there is less than one token; `reads` matches nothing, or the slot is taken.
    """
    if num_tokens < 1:
        raise ValueError(f"{name}: num_tokens is at least 1, not {num_tokens}.")

    def read(params: Params) -> str:
        return tree.matches(params, reads, who=name)[0]

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        fields = make(key, tree.flatten(params)[read(params)])
        return params, {name: tree.unflatten({f"{slot}/{field}": array for field, array in fields.items()})}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        flat = tree.flatten(frozen)
        if taken := [path for path in flat if path.startswith(f"{slot}/")]:
            raise ValueError(f"{name}: another method has filled {taken[0]!r}; a model has one prompt and one prefix.")
        trained = {path.removeprefix(f"{slot}/"): array for path, array in tree.flatten(trainable[name]).items()}
        dtype = flat[read(frozen)].dtype
        return tree.unflatten({**flat, **{f"{slot}/{field}": array.astype(dtype) for field, array in feed(trained).items()}})

    def plan(params: Params) -> tuple[Plan, ...]:
        return (Plan(name, reads, (read(params),), {"num_tokens": num_tokens, **options}, kind),)

    return Transform(init, attach, plan)


def check_no_virtual_tokens(paths: Any, who: str) -> None:
    """Refuse a tree with virtual tokens where matrices are wanted."""
    if found := [path for path in paths if path.startswith((f"{PROMPT}/", f"{PREFIX}/"))]:
        raise ValueError(
            f"{who}: {found[0]!r} is read before every row and there is no matrix to merge it into: keep the adapter beside its model "
            "(`ftjax generate --adapter=…`)."
        )


def mlp(x: jax.Array, fields: Fields, act: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return `… act(act(x w1 + b1) w2 + b2) …`, for as many layers as there are fields, the last of them without an `act`."""
    count = sum(field.startswith("w") for field in fields)
    for layer in range(1, count + 1):
        x = x @ fields[f"w{layer}"] + fields[f"b{layer}"][None]
        x = act(x) if layer < count else x
    return x


def linear_layers(key: jax.Array, *sizes: int) -> dict[str, jax.Array]:
    """Return w and b of layers between these widths, each U(±1/√inputs) as in PyTorch."""
    fields = {}
    for layer, (i, o) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), 1):
        w_key, b_key = jax.random.split(jax.random.fold_in(key, layer))
        bound = 1 / np.sqrt(i)
        fields[f"w{layer}"] = jax.random.uniform(w_key, (i, o), jnp.float32, -bound, bound)
        fields[f"b{layer}"] = jax.random.uniform(b_key, (o,), jnp.float32, -bound, bound)
    return fields
