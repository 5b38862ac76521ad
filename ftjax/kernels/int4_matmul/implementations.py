"""Which implementation multiplies: the first that fits on the platform that the program is lowered for, or the one asked for.

Nothing falls back in silence: `choice` says what runs and why not what stands before it, and an implementation that is asked for by name
and cannot run raises its reason, for a shape when the product is traced and for a platform when the program is lowered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ftjax import tree
from ftjax.kernels.int4_matmul import decode, hopper, reference, tpu
from ftjax.kernels.int4_matmul.decode import Packed, Spec


class Implementation(NamedTuple):
    """A way to compute both products. Rows are `[m, i]` or `[m, o]`, the matrix is one, not a stack; results have the dtype of the rows."""

    product: Callable[[Spec, jax.Array, Packed], jax.Array]
    """`x D(w)`, `[m, i] -> [m, o]`."""
    product_transposed: Callable[[Spec, jax.Array, Packed], jax.Array]
    """`x D(w)ᵀ`, `[m, o] -> [m, i]`."""
    unfit: Callable[[Spec, int, Packed, jnp.dtype], str | None] = lambda spec, rows, w, dtype: None
    """Why it cannot, for so many rows of a dtype and a matrix of which only shapes are looked at: what is expected, what came and what
    would help; None if it can. What can run one product can run the other, which is its gradient."""
    platforms: tuple[str, ...] = ()
    """Where it runs, as JAX names platforms; empty: anywhere."""


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "tpu": Implementation(tpu.product, tpu.product_transposed, tpu.unfit, ("tpu",)),
    "gpu": Implementation(hopper.product, hopper.product_transposed, hopper.unfit, ("cuda",)),
    "reference": Implementation(reference.product, reference.product_transposed),
}
"""In the order in which `"auto"` asks them; the last takes everything."""


class Choice(NamedTuple):
    """What runs, and why not the others."""

    name: str
    """Of `IMPLEMENTATIONS`."""
    passed: Mapping[str, str]
    """The reason of each that was asked before."""


def choice(spec: Spec, rows: int, w: Packed, dtype: jnp.dtype, *, platform: str, implementation: str = "auto") -> Choice:
    """Return what multiplies so many rows of a dtype by a matrix, given by its shapes, in a program for a platform ("tpu", "cuda", "cpu").

    Raises:
      ValueError: there is no implementation of this name, or it cannot; the message says why.
    """
    if implementation != "auto":
        if reason := _unfit(check(implementation), spec, rows, w, dtype, platform):
            raise ValueError(_refusal(implementation, reason))
        return Choice(implementation, {})
    passed = {}
    for name in IMPLEMENTATIONS:
        reason = _unfit(name, spec, rows, w, dtype, platform)
        if reason is None:
            break
        passed[name] = reason
    return Choice(name, passed)


def check(implementation: str) -> str:
    """Return the name; `"auto"` is one too.

    Raises:
      ValueError: there is none of this name.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        near = tree.nearest(implementation, ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"int4_matmul: there is no implementation {implementation!r}; nearest: {near}.")
    return implementation


def run(direction: str, spec: Spec, implementation: str, x: jax.Array, w: Packed) -> jax.Array:
    """Return the product of this name, one of the two fields of `Implementation`, on what is chosen."""
    chosen = functools.partial(choice, spec, x.shape[0], w, x.dtype)
    forms = {name: functools.partial(getattr(one, direction), spec) for name, one in IMPLEMENTATIONS.items()}
    if implementation == "auto":
        known = dict.fromkeys(platform for one in IMPLEMENTATIONS.values() for platform in one.platforms)
        names = {platform: chosen(platform=platform).name for platform in known}
        default = chosen(platform="").name
        special = {platform: forms[name] for platform, name in names.items() if name != default}
        return jax.lax.platform_dependent(x, w, default=forms[default], **special) if special else forms[default](x, w)
    platforms = IMPLEMENTATIONS[check(implementation)].platforms
    chosen(platform=platforms[0] if platforms else "", implementation=implementation)
    if not platforms:
        return forms[implementation](x, w)
    reason = _refusal(implementation, _elsewhere(platforms, "another platform"))
    here = dict.fromkeys(platforms, forms[implementation])
    size = decode.shape(spec, w)[direction == "product"]
    return jax.lax.platform_dependent(x, w, default=lambda x, w: _refuse.bind(x, size=size, reason=reason), **here)


def _unfit(name: str, spec: Spec, rows: int, w: Packed, dtype: jnp.dtype, platform: str) -> str | None:
    one = IMPLEMENTATIONS[name]
    if one.platforms and platform not in one.platforms:
        return _elsewhere(one.platforms, platform)
    return one.unfit(spec, rows, w, jnp.dtype(dtype))


def _elsewhere(platforms: tuple[str, ...], platform: str) -> str:
    return f"it runs on {' and '.join(platforms)}, and the program is for {platform or 'another platform'}."


def _refusal(name: str, reason: str) -> str:
    return f"int4_matmul: implementation {name!r} cannot take this product: {reason} 'auto' takes one that can."


def _raise(*_, reason: str, **__):
    raise ValueError(reason)


_refuse = Primitive("int4_matmul_refuse")
"""Raises its reason where it is run, or lowered in a program that would run it: only then is the platform known."""
_refuse.def_abstract_eval(lambda x, *, size, reason: jax.core.ShapedArray((x.shape[0], size), x.dtype))
_refuse.def_impl(_raise)
mlir.register_lowering(_refuse, _raise)
