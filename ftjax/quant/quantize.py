"""From numbers to codes: `quantize` makes a `QuantizedWeight` of a matrix, one layer of a stack after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ftjax import tree
from ftjax.kernels import int4_matmul
from ftjax.quant import blockwise, codes
from ftjax.quant.blockwise import TINY
from ftjax.quant.mean import mean
from ftjax.quant.weight import SPECS, NestedScales, QuantizedWeight, magnitudes


def quantize(w: Float[Array, "*l i o"], format: str = "nf4", *, group: int | None = 64, nested: bool = False) -> QuantizedWeight:
    """Return the matrix in a 4-bit or 8-bit format.

    nf4, fp4, int8: the code nearest to w / a, with a the largest magnitude of the group; int4: round(w / s), s = a / 7; uint4:
    round(w / s) + z, s = (max - min) / 15 and z = round(-min / s), with zero between min and max.

    Codes and scales of nf4, fp4 and int8 are those of bitsandbytes 0.50, bit for bit (its blocks run along the rows of `[o, i]`, which are
    our columns); nested scales too: of a - mean(a) the nearest number of the dynamic code, 256 a block. Where PyTorch adds in another order
    (`ftjax.quant.mean`) its mean may be an ulp off, and about one nested code in 30,000 is then the next one.

    Args:
      w: `[..., i, o]`, finite.
      format: of `weight.SPECS`.
      group: consecutive rows that share a scale; None: all.
      nested: quantise the scales too.

    Raises:
      ValueError: there is no such format, the rows do not divide into groups, or w is no matrix.
    """
    if format not in SPECS:
        raise ValueError(f"quant: there is no format {format!r}; nearest: {tree.nearest(format, SPECS)}.")
    if w.ndim < 2:
        raise ValueError(f"quant: a matrix [..., i, o] is expected, not {list(w.shape)}.")
    group = group or w.shape[-2]
    if w.shape[-2] % group or group % 2:
        raise ValueError(f"quant: {w.shape[-2]} rows of {list(w.shape)} do not divide into groups of {group}, an even number.")

    def one(matrix: jax.Array) -> QuantizedWeight:
        return _quantize(matrix.astype(jnp.float32), format, group, nested)

    for _ in range(w.ndim - 2):
        one = _over_layers(one)
    found = one(w)
    return QuantizedWeight(found.codes, found.scales, found.zeros, format, jnp.dtype(w.dtype).name)


NOT_FINITE = "the file is damaged, or its training diverged. No format can store them."
"""What to say of numbers that are not finite."""


def _finite(w: QuantizedWeight) -> Bool[Array, "*l"]:
    """Return of each matrix whether its scales are finite; they are not if a number that they are of was not."""
    layers = w.codes.ndim - 2
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x), axis=tuple(range(layers, x.ndim))) for x in magnitudes(w.scales)]), axis=0)


def check_finite(who: str, leaves: Mapping[str, Any]) -> None:
    """Refuse packed matrices among leaves by path whose scales are not finite. While they are traced nothing is known of them.

    Raises:
      ValueError: there is one; the message names it.
    """
    for path, leaf in leaves.items():
        for part in jax.tree.leaves(leaf, is_leaf=lambda part: isinstance(part, QuantizedWeight)):
            if not isinstance(part, QuantizedWeight) or isinstance(part.codes, jax.core.Tracer):
                continue
            fine = jax.device_get(_finite(part))
            if not fine.all():
                layers = f", in layers {np.flatnonzero(~fine).tolist()}" if fine.ndim else ""
                raise ValueError(f"{who}: {path!r} holds numbers that are not finite{layers}: {NOT_FINITE}")


def _over_layers(one):
    return lambda stack: jax.lax.map(one, stack)


def _quantize(w: jax.Array, format: str, group: int, nested: bool) -> QuantizedWeight:
    i, o = w.shape
    grouped = w.reshape(i // group, group, o)
    zeros = None
    if format in ("uint4", "uint8"):
        (least, most), dtype = {"uint4": ((0, 15), jnp.uint8), "uint8": ((-128, 127), jnp.int8)}[format]
        low, high = jnp.minimum(jnp.min(grouped, axis=1), 0), jnp.maximum(jnp.max(grouped, axis=1), 0)
        scales = (high - low) / (most - least)
        zeros = jnp.round(-low / jnp.maximum(scales, TINY)) + least
        found = jnp.round(grouped / jnp.maximum(scales, TINY)[:, None]) + zeros[:, None]
        found = jnp.clip(found, least, most).astype(dtype)
    else:
        scales = jnp.max(jnp.abs(grouped), axis=1)
        if format == "int4":
            scales = scales / 7
            found = jnp.clip(jnp.round(grouped / jnp.maximum(scales, TINY)[:, None]), -7, 7).astype(jnp.int8).astype(jnp.uint8) & 15
        elif format == "int8":
            found = jnp.round(grouped * (127.0 / jnp.maximum(scales, TINY))[:, None]).astype(jnp.int8)
        else:
            scaled = jnp.clip(grouped * (1.0 / jnp.maximum(scales, TINY))[:, None], -1, 1)
            found = codes.nearest(scaled, codes.NF4 if format == "nf4" else codes.FP4)
    found = found.reshape(i, o)
    return QuantizedWeight(
        found if SPECS[format].bits == 8 else int4_matmul.pack(found), _nest(scales) if nested else scales, zeros, format, "float32"
    )


def _nest(scales: jax.Array) -> NestedScales:
    """Return scales `[n, o]` quantised: minus their mean, by the largest magnitude of 256 of them, to the nearest number of the code."""
    # Without the barrier the difference may be fused with the quotient, and rounded once.
    offset = jax.lax.optimization_barrier(mean(scales.T.reshape(-1)))
    return NestedScales(*blockwise.pack(scales.T - offset, codes.dynamic()), offset)
