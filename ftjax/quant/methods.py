"""Quantised bases as methods: transforms that replace frozen matrices by packed ones and train nothing.

`peft.chain(quant.nf4(), peft.lora())` is QLoRA (Dettmers et al. 2023, arXiv:2305.14314): the adapter rides on the packed leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax

from ftjax import tree
from ftjax.kernels import int4_matmul
from ftjax.quant.permuted import PermutedWeight
from ftjax.quant.quantize import check_finite, quantize
from ftjax.quant.weight import SPECS, QuantizedWeight
from ftjax.types import Params, Plan, Transform
from ftjax.weights import Weight


def quantized(
    format: str,
    targets: tree.Filter = "all-linear",
    *,
    group: int | None = 64,
    nested: bool = False,
    exclude: tree.Filter | None = None,
    implementation: str = "auto",
    name: str = "",
) -> Transform:
    """Store frozen matrices in a 4-bit or 8-bit format; those that are in it already stay as they are, and get the implementation.

    y = x D(codes, scales)   (see `ftjax.quant.quantize` and `ftjax.kernels.int4_matmul.decode`)

    Bits of a number: those of its code, 32 / group for its scale (nested: 8 / group + 32 / (256 group)), and as many again for zeros.

    Args:
      format: "nf4", "fp4", "int4", "int8", or with zero points "uint4" or "uint8".
      targets: which matrices (see `ftjax.tree`).
      group: consecutive rows (of `[i, o]`) that share a scale; None: all.
      nested: quantise the scales too (QLoRA's double quantisation).
      exclude: matrices to leave as they are.
      implementation: of the products, of `ftjax.kernels.int4_matmul.IMPLEMENTATIONS`; "auto": the first that fits.
      name: the method's name in the plan, the format's if empty.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no plain matrix, or one that is packed otherwise; the rows do not divide into
        groups; a matrix, if it is not traced, has a number that is not finite; there is no such format or implementation.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 128, 6), jnp.bfloat16)}}}
      >>> frozen, trainable = quantized("nf4", ["q_proj"]).init(jax.random.key(0), params)
      >>> frozen["layers"]["q_proj"]["kernel"].codes.shape, trainable
      ((2, 64, 6), {})
    """
    name = name or format
    if format not in SPECS:
        raise ValueError(f"{name}: there is no format {format!r}; nearest: {tree.nearest(format, SPECS)}.")
    int4_matmul.check(implementation)

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        del key
        flat = tree.flatten(params)
        paths = tree.matches(params, targets, who=name, exclude=exclude)
        found = {path: _multiplied(packed(path, flat[path]), implementation) for path in paths}
        check_finite(name, found)
        return tree.replace(params, found), {}

    def packed(path: str, leaf: Any) -> QuantizedWeight | PermutedWeight:
        if isinstance(leaf, QuantizedWeight | PermutedWeight):
            check(path, leaf.base if isinstance(leaf, PermutedWeight) else leaf)
            return leaf
        if isinstance(leaf, Weight) or len(leaf.shape) < 2 or not path.endswith("kernel"):
            raise ValueError(f"{name}: {path!r} with shape {list(leaf.shape)} is no plain matrix; target kernels, and quantise first.")
        try:
            return quantize(leaf, format, group=group, nested=nested)
        except ValueError as error:
            raise ValueError(f"{name}: {path!r}: {error} Choose another group, or exclude it.") from error

    def check(path: str, leaf: QuantizedWeight) -> None:
        found, wanted = (leaf.format, leaf.group, leaf.nested), (format, group or leaf.shape[-2], nested)
        if found != wanted:
            raise ValueError(f"{name}: {path!r} is packed already, {_described(*found)}, and not {_described(*wanted)}; leave it as it is.")

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del trainable, key
        return frozen

    def plan(params: Params) -> tuple[Plan, ...]:
        paths = tree.matches(params, targets, who=name, exclude=exclude)
        return (Plan(name, tree.describe(targets), paths, {"group": group, "nested": nested}, format),)

    return Transform(init, attach, plan)


def multiplied_by(params: Params, implementation: str) -> Params:
    """Return the tree whose packed matrices have this implementation of their products (see `quantized`).

    Raises:
      ValueError: there is no such implementation, or no packed matrix.
    """
    int4_matmul.check(implementation)
    found = {path: leaf for path, leaf in tree.flatten(params).items() if isinstance(leaf, QuantizedWeight | PermutedWeight)}
    if not found:
        raise ValueError(f"quant: {implementation!r} multiplies packed matrices, and this model has none.")
    return tree.replace(params, {path: _multiplied(leaf, implementation) for path, leaf in found.items()})


def _multiplied(leaf: QuantizedWeight | PermutedWeight, implementation: str) -> QuantizedWeight | PermutedWeight:
    if isinstance(leaf, PermutedWeight):
        return dataclasses.replace(leaf, base=_multiplied(leaf.base, implementation))
    return dataclasses.replace(leaf, implementation=implementation)


def _described(format: str, group: int, nested: bool) -> str:
    return f"{format} by {group} rows{' with nested scales' if nested else ''}"


def packing(plans: Iterable[Plan]) -> dict[str, dict[str, Any]]:
    """Return `{path: arguments of quantize}` for all that plans of `quantized` name: what a loader packs as it reads."""
    return {path: {"format": row.kind, **row.options} for row in plans if row.kind in SPECS for path in row.paths}


nf4 = partial(quantized, "nf4", nested=True)
fp4 = partial(quantized, "fp4", nested=True)
int4 = partial(quantized, "int4")
uint4 = partial(quantized, "uint4")
int8 = partial(quantized, "int8", group=None)
uint8 = partial(quantized, "uint8", group=None)
METHODS = {"nf4": nf4, "fp4": fp4, "int4": int4, "uint4": uint4, "int8": int8, "uint8": uint8}
"""`{name: function}`, for configs, as `ftjax.peft.METHODS`."""
