"""ftjax's own files of quantised matrices: the arrays of `QuantizedWeight` as they are, which takes what no other layout has a place for.

    weight.codes, weight.zeros, weight.order                 as in `ftjax.quant`, a layer at a time
    weight.scales, or weight.scales.{codes, scales, mean}    plain, or nested

The `quantization_config` says of each module its format and dtype: `"matrices": {"model.layers.0.mlp.up_proj": ["int4", "bfloat16"]}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ftjax import tree
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.quantized_parts import DTYPES, Parts, plain
from ftjax.quant import SPECS, NestedScales, QuantizedWeight
from ftjax.quant.permuted import PermutedWeight
from ftjax.quant.weight import NESTED_BLOCK

PARTS = re.compile(r"(.+)\.(weight\.(?:codes|zeros|order|scales(?:\.(?:codes|scales|mean))?))")
OPTIONS: Mapping[str, tuple[Any, ...] | None] = {"version": (1,), "matrices": None}


def read(parts: Parts) -> QuantizedWeight | PermutedWeight:
    """Return the matrix `[i, o]`, of lazy arrays.

    Raises:
      ValueError: a tensor is missing, misshapen or not what it should hold, or the config does not say what the matrix is.
    """
    said = (parts.settings.get("matrices") or {}).get(parts.module)
    if not isinstance(said, list) or len(said) != 2 or said[0] not in SPECS or said[1] not in DTYPES:
        raise parts.error("weight.codes", f"needs [format, dtype] in quantization_config['matrices'], not {said!r}")
    format, dtype = said
    bits = SPECS[format].bits
    codes = parts.take("weight.codes", None, [np.uint8 if bits == 4 else np.int8])
    if len(codes.shape) != 2:
        raise parts.error("weight.codes", f"is {list(codes.shape)}, expected a matrix")
    i, o = codes.shape[0] * 8 // bits, codes.shape[1]
    scales, n = _scales(parts, o)
    if n < 1 or i % n:
        raise parts.error("weight.scales", f"are of {n} groups, which do not divide {i} rows")
    zeros = parts.numbers("weight.zeros", [n, o]) if "weight.zeros" in parts.tensors else None
    weight = QuantizedWeight(codes, scales, zeros, format, dtype)
    if "weight.order" not in parts.tensors:
        return weight
    order = parts.take("weight.order", [i], [np.int32])
    if not np.array_equal(np.sort(order.read()), np.arange(i)):
        raise parts.error("weight.order", f"is no order of {i} rows")
    return PermutedWeight(weight, order)


def _scales(parts: Parts, o: int) -> tuple[LazyTensor | NestedScales, int]:
    """Return the scales, and of how many groups they are."""
    if "weight.scales.codes" not in parts.tensors:
        n = parts.take("weight.scales", None, [np.float32]).shape[0]
        return parts.numbers("weight.scales", [n, o]), n
    codes = parts.take("weight.scales.codes", None, [np.uint8])
    n = codes.shape[-1]
    return NestedScales(
        parts.take("weight.scales.codes", [o, n], [np.uint8]),
        parts.numbers("weight.scales.scales", [-(-o * n // NESTED_BLOCK)]),
        parts.numbers("weight.scales.mean", []),
    ), n


def settings(weights: Mapping[str, QuantizedWeight | PermutedWeight], dense: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a folder with these matrices, by module."""
    del dense
    said = {module: [plain(weight).format, plain(weight).dtype_name] for module, weight in weights.items()}
    return {"quant_method": "ftjax", "version": 1, "matrices": said}


def write(weight: QuantizedWeight | PermutedWeight) -> dict[str, LazyTensor]:
    """Return the tensors of a matrix, by what follows the module's name."""
    base, arrays = plain(weight), {}
    scales = {"codes": base.scales.codes, "scales": base.scales.scales, "mean": base.scales.mean} if base.nested else base.scales
    arrays = tree.flatten({"codes": base.codes, "scales": scales, "zeros": base.zeros})
    arrays |= {"order": weight.order} if isinstance(weight, PermutedWeight) else {}
    return {f"weight.{path.replace('/', '.')}": array for path, array in arrays.items() if array is not None}
