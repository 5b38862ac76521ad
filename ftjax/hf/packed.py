"""From a file to a packed matrix, a layer at a time: of the dense one no more than a layer ever exists.

`pack` makes the whole leaf; of the lazy one of a `Packer` no more than a layer ever exists either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from ftjax import weights
from ftjax.hf import names
from ftjax.hf.lazy import Index, LazyTensor, aligned_empty, unstacked
from ftjax.quant import NestedScales, QuantizedWeight, quantize
from ftjax.quant.quantize import NOT_FINITE
from ftjax.quant.weight import magnitudes
from ftjax.weights import Leaf

_quantize = jax.jit(quantize, static_argnames=("format", "group", "nested"))
_materialize = jax.jit(weights.materialize)


@partial(jax.jit, static_argnames=("format", "group", "nested"))
def _scales_of(w: jax.Array, **options: Any) -> jax.Array | NestedScales:
    """Return the scales of `quantize`, bit for bit, in a tenth of the time."""
    return quantize(w, **options).scales


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
        return _packed(path, _block(tensor, None), None, options)
    shapes = jax.eval_shape(partial(quantize, **options), jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
    whole = jax.tree.map(lambda shape: aligned_empty(shape.shape, shape.dtype), shapes)
    for layer in range(tensor.shape[0]):
        found = _packed(path, _block(tensor, layer), layer, options)
        for place, part in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            place[layer] = part
    return whole


def repack(path: str, leaf: Leaf, **options: Any) -> QuantizedWeight:
    """Return a leaf quantised, whatever it is: an adapter over a packed matrix is folded in, a layer at a time. See `pack`."""

    def fetch(index: Index) -> np.ndarray:
        return np.asarray(jax.device_get(_materialize(jax.tree.map(lambda x: x[index[0]], leaf))))

    return pack(path, LazyTensor(leaf.shape, np.dtype(leaf.dtype), fetch), **options)


class Packer:
    """Makes leaves that are packed as they are read, a layer at a time.

    It remembers the layer that was last read, whose parts are asked for one after another, and nothing else.
    """

    def __init__(self) -> None:
        self._last: tuple[str, int | None] | None = None
        self._scales: jax.Array | NestedScales | None = None
        self._whole: QuantizedWeight | None = None

    def lazy(self, path: str, tensor: LazyTensor, **options: Any) -> QuantizedWeight:
        """Return the leaf of `pack`, of lazy arrays: reading one packs its layers, and raises where that does.

        Scales alone are quickly had, so a writer may ask for them first and for all of it later.
        """
        shapes = jax.eval_shape(partial(quantize, **options), jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))

        def part(shape: jax.ShapeDtypeStruct, get: Callable[[int | None], np.ndarray]) -> LazyTensor:
            def fetch(index: Index) -> np.ndarray:
                if not names.is_stacked(path):
                    return get(None)[index]
                return np.stack([get(layer)[index[1:]] for layer in range(tensor.shape[0])[index[0]]])

            return LazyTensor(shape.shape, np.dtype(shape.dtype), fetch)

        def number(at: int) -> Callable[[int | None], np.ndarray]:
            return lambda layer: jax.tree.leaves(self._scales_of(path, tensor, layer, options))[at]

        scales, structure = jax.tree.flatten(shapes.scales)
        return dataclasses.replace(
            shapes,
            codes=part(shapes.codes, lambda layer: self._all_of(path, tensor, layer, options).codes),
            scales=jax.tree.unflatten(structure, [part(shape, number(at)) for at, shape in enumerate(scales)]),
            zeros=shapes.zeros and part(shapes.zeros, lambda layer: self._all_of(path, tensor, layer, options).zeros),
        )

    def _scales_of(self, path: str, tensor: LazyTensor, layer: int | None, options: Mapping[str, Any]) -> jax.Array | NestedScales:
        if self._last != (path, layer):
            block = _block(tensor, layer)
            self._last, self._whole = (path, layer), None
            self._scales = _sound(path, block, layer, jax.device_get(_scales_of(jax.device_put(block), **options)))
        return self._scales

    def _all_of(self, path: str, tensor: LazyTensor, layer: int | None, options: Mapping[str, Any]) -> QuantizedWeight:
        if self._last != (path, layer) or self._whole is None:
            self._whole = _packed(path, _block(tensor, layer), layer, options)
            self._last, self._scales = (path, layer), self._whole.scales
        return self._whole


def _block(tensor: LazyTensor, layer: int | None) -> np.ndarray:
    return tensor.read() if layer is None else unstacked(tensor, layer).read()


def _packed(path: str, block: np.ndarray, layer: int | None, options: Mapping[str, Any]) -> QuantizedWeight:
    """Return one matrix quantised, on the host."""
    found = jax.device_get(_quantize(jax.device_put(block), **options))
    _sound(path, block, layer, found.scales)
    return found


def _sound(path: str, block: np.ndarray, layer: int | None, scales: Any) -> Any:
    """Return the scales of a matrix, if its numbers are finite."""
    # The largest magnitude of a group is not finite if a number of it is not.
    if not all(np.isfinite(part).all() for part in magnitudes(scales)):
        bad = ~np.isfinite(block.astype(np.float32))
        place = "" if layer is None else f", layer {layer},"
        raise ValueError(
            f"hf: {path!r}{place} holds {bad.sum():,} numbers that are not finite, the first at {np.argwhere(bad)[:1].tolist()} of "
            f"{list(block.shape)}: {NOT_FINITE}"
        )
    return scales
