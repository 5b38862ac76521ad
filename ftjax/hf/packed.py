"""From a file to a packed matrix, a layer at a time: of the dense one no more than a layer ever exists."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from ftjax import weights
from ftjax.hf import names
from ftjax.hf.lazy import Index, LazyTensor, aligned_empty
from ftjax.quant import NestedScales, QuantizedWeight, quantize
from ftjax.weights import Leaf

_quantize = jax.jit(quantize, static_argnames=("format", "group", "nested"))
_materialize = jax.jit(weights.materialize)


def pack(path: str, tensor: LazyTensor, **options: Any) -> QuantizedWeight:
    """Return the leaf of this path quantised, of host arrays: bit for bit what `quantize` makes of all of it.

    Every process of a mesh reads all layers, for a scale may be quantised with those of other devices.

    Args:
      path: of the leaf.
      tensor: `[..., i, o]`, still in its file.
      options: of `ftjax.quant.quantize`.

    Raises:
      ValueError: a layer holds numbers that are not finite.
    """
    if not names.is_stacked(path):
        return _packed(path, tensor.read(), None, options)
    shapes = jax.eval_shape(partial(quantize, **options), jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
    whole = jax.tree.map(lambda shape: aligned_empty(shape.shape, shape.dtype), shapes)
    for layer in range(tensor.shape[0]):
        (block,) = tensor.read((slice(layer, layer + 1),))
        for place, part in zip(jax.tree.leaves(whole), jax.tree.leaves(_packed(path, block, layer, options)), strict=True):
            place[layer] = part
    return whole


def repack(path: str, leaf: Leaf, **options: Any) -> QuantizedWeight:
    """Return a leaf quantised, whatever it is: an adapter over a packed matrix is folded in, a layer at a time. See `pack`."""

    def fetch(index: Index) -> np.ndarray:
        return np.asarray(jax.device_get(_materialize(jax.tree.map(lambda x: x[index[0]], leaf))))

    return pack(path, LazyTensor(leaf.shape, np.dtype(leaf.dtype), fetch), **options)


def _packed(path: str, block: np.ndarray, layer: int | None, options: dict[str, Any]) -> QuantizedWeight:
    """Return one matrix quantised, on the host."""
    found = jax.device_get(_quantize(jax.device_put(block), **options))
    scales = found.scales
    summary = (scales.mean, scales.scales) if isinstance(scales, NestedScales) else (scales,)
    if not all(np.isfinite(part).all() for part in summary):  # the largest magnitude of a group is not finite if a number of it is not
        bad = ~np.isfinite(block.astype(np.float32))
        place = "" if layer is None else f", layer {layer},"
        raise ValueError(
            f"hf: {path!r}{place} holds {bad.sum():,} numbers that are not finite, the first at {np.argwhere(bad)[:1].tolist()} of "
            f"{list(block.shape)}: the file is damaged, or its training diverged. No format can store them."
        )
    return found
