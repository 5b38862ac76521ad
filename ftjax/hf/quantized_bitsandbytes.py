"""bitsandbytes' files: NF4 and FP4 by blocks along the rows of `[o, i]`, scales perhaps quantised in turn; int8 by rows.

    weight [o i / 2, 1]      the first of two codes in the high half of a byte (ours: in the low one)
    weight.absmax [o i / g]  scales of the blocks, float32, or codes of scales with weight.nested_absmax and weight.nested_quant_map
    weight.quant_map [16]    the code book
    weight.quant_state.bitsandbytes__nf4   JSON: shape, block, dtype, mean of the scales
    weight [o, i] and SCB [o]              of int8, W = weight · SCB / 127

(Dettmers et al. 2022, 2023, arXiv:2208.07339, arXiv:2305.14314.) Values are those of its own dequantisation bit for bit: a float32 product,
rounded once to the dtype that is multiplied in. bitsandbytes rounds 4-bit values to the dtype of `quant_state` before that one, which is
the same where the two agree; its int8 product rounds activations to eight bits as well, and ours does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ftjax import tree
from ftjax.hf.lazy import LazyTensor, from_array, swap
from ftjax.hf.quantized_parts import DTYPES, FLOATS, Parts, grid, made, mapped, require
from ftjax.quant import NestedScales, QuantizedWeight, codes
from ftjax.quant.permuted import PermutedWeight
from ftjax.quant.weight import NESTED_BLOCK

PARTS = re.compile(r"(.+)\.(weight|weight\..+|SCB|weight_format)")
OPTIONS: Mapping[str, tuple[Any, ...] | None] = {
    "load_in_4bit": None,
    "load_in_8bit": None,
    "_load_in_4bit": None,
    "_load_in_8bit": None,
    "bnb_4bit_compute_dtype": None,
    "bnb_4bit_quant_storage": None,
    "bnb_4bit_quant_type": ("nf4", "fp4", None),
    "bnb_4bit_use_double_quant": None,
    "llm_int8_enable_fp32_cpu_offload": None,
    "llm_int8_has_fp16_weight": (False, None),
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": None,
}
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""That its kernels know."""

_STATE = "weight.quant_state.bitsandbytes__"
_STATE_KEYS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_NESTED_KEYS = {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float}
_BOOKS = {"nf4": codes.NF4, "fp4": codes.FP4}


def read(parts: Parts) -> QuantizedWeight:
    """Return the matrix `[i, o]`, of lazy arrays.

    Raises:
      ValueError: a tensor is missing, misshapen or not what it should hold; or a block runs from one row into the next.
    """
    return _int8(parts) if "SCB" in parts.tensors else _four_bits(parts)


def _int8(parts: Parts) -> QuantizedWeight:
    weight = parts.take("weight", None, [np.int8])
    if len(weight.shape) != 2:
        raise parts.error("weight", f"is {list(weight.shape)}, expected a matrix")
    if "weight_format" in parts.tensors and np.any(parts.take("weight_format", None, [np.uint8]).read()):
        raise parts.error("weight_format", "is not 0: the rows are in the order of some GPU, which bitsandbytes itself no longer reads")
    scales = parts.numbers("SCB", weight.shape[:1], low=0)
    return QuantizedWeight(
        swap(weight),
        LazyTensor((1, *scales.shape), scales.dtype, lambda at: scales.read(at[1:])[None][at[0]]),
        None,
        "int8",
        parts.dtype.name,
    )


def _four_bits(parts: Parts) -> QuantizedWeight:
    kind, state = _state(parts)
    (o, i), block = state["shape"], state["blocksize"]
    if i % block:
        raise parts.error("weight", f"has rows of {i} numbers, which blocks of {block} do not divide: a block would straddle two of them")
    n, weight = i // block, parts.take("weight", None, [np.uint8, *FLOATS])
    if math.prod(weight.shape) * weight.dtype.itemsize != o * i // 2 or max(weight.shape) != math.prod(weight.shape):
        raise parts.error("weight", f"is {list(weight.shape)} {weight.dtype.name}, expected {o * i // 2} bytes for {o} x {i} codes")
    _expect_book(parts, "weight.quant_map", _BOOKS[kind])
    packed = mapped(_halves_swapped, swap(grid(weight, o, i // 2, np.uint8)))
    if "nested_offset" not in state:
        scales: Any = swap(grid(parts.numbers("weight.absmax", [o * n], low=0), o, n))
    else:
        _expect_book(parts, "weight.nested_quant_map", codes.dynamic())
        scales = NestedScales(
            grid(parts.take("weight.absmax", [o * n], [np.uint8]), o, n),
            parts.numbers("weight.nested_absmax", [-(-o * n // NESTED_BLOCK)], low=0),
            from_array(np.asarray(state["nested_offset"], np.float32)),
        )
    return QuantizedWeight(packed, scales, None, kind, state["dtype"])


def _halves_swapped(block: np.ndarray) -> np.ndarray:
    return (block >> 4) | (block << 4)


def _state(parts: Parts) -> tuple[str, dict[str, Any]]:
    """Return the kind of four bits and what `quant_state` says, checked."""
    found = [name for name in parts.tensors if name.startswith("weight.quant_state")]
    if len(found) != 1 or found[0].removeprefix(_STATE) not in _BOOKS:
        raise parts.error(f"{_STATE}nf4", f"(or fp4) is expected once, beside {', '.join(sorted(parts.tensors))}")
    (name,) = found
    kind = name.removeprefix(_STATE)
    try:
        state = json.loads(parts.take(name, None, [np.uint8]).read().tobytes())
    except ValueError as error:
        raise parts.error(name, f"is not the JSON that it should be: {error}") from error
    problems = _state_problems(state, kind)
    if problems:
        raise parts.error(name, f"says what cannot be: {'; '.join(problems)}")
    return kind, state


def _state_problems(state: Any, kind: str) -> list[str]:
    if not isinstance(state, dict):
        return [f"{state!r} is no object"]
    nested = any(key in state for key in _NESTED_KEYS)
    keys = _STATE_KEYS | (_NESTED_KEYS if nested else {})
    found = [f"{key!r} is unknown; nearest: {tree.nearest(key, keys)}" for key in state if key not in keys]
    found += [
        f"{key} is missing" if key not in state else f"{key} is {state[key]!r}, expected {type_.__name__}"
        for key, type_ in keys.items()
        if not isinstance(state.get(key), type_)
    ]
    if found:
        return found
    shape, block = state["shape"], state["blocksize"]
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        found.append(f"shape is {shape}, expected two sizes")
    if block < 2 or block & (block - 1):
        found.append(f"blocksize is {block}, expected a power of two")
    if state["quant_type"] != kind:
        found.append(f"quant_type is {state['quant_type']!r} in a tensor named {kind}")
    if state["dtype"] not in DTYPES:
        found.append(f"dtype is {state['dtype']!r}, expected one of {', '.join(DTYPES)}")
    if nested and state["nested_blocksize"] != NESTED_BLOCK:
        found.append(f"nested_blocksize is {state['nested_blocksize']}, only {NESTED_BLOCK} is implemented")
    if nested and not math.isfinite(state["nested_offset"]):
        found.append(f"nested_offset is {state['nested_offset']}")
    return found


def _expect_book(parts: Parts, name: str, book: np.ndarray) -> None:
    found = parts.take(name, book.shape, [np.float32]).read()
    if not np.allclose(found, book, rtol=1e-5, atol=0):  # releases differ in the last place
        at = int(np.argmax(~np.isclose(found, book, rtol=1e-5, atol=0)))
        raise parts.error(name, f"is another code book: number {at} is {found[at]:g}, expected {book[at]:g}; the file is damaged")


def settings(weights: Mapping[str, QuantizedWeight], dense: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a folder with these matrices; `dense` are the modules left as they are."""
    formats = {weight.format for weight in weights.values()}
    require(len(formats) == 1, f"bitsandbytes has one format in a model, not {' and '.join(sorted(formats))}")
    (format,) = formats
    first = next(iter(weights.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": format != "int8",
        "load_in_8bit": format == "int8",
        "bnb_4bit_compute_dtype": first.dtype_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": format if format in _BOOKS else "fp4",
        "bnb_4bit_use_double_quant": first.nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(dense) or None,
        "llm_int8_threshold": 6.0,
    }


def write(weight: QuantizedWeight | PermutedWeight) -> dict[str, LazyTensor]:
    """Return the tensors of a matrix, by what follows the module's name.

    Raises:
      Unfit: the layout has no place for it.
    """
    require(not isinstance(weight, PermutedWeight), "bitsandbytes has blocks of rows that lie side by side only")
    require(weight.format in ("nf4", "fp4", "int8"), f"bitsandbytes has nf4, fp4 and int8, not {weight.format}")
    i, o = weight.shape
    if weight.format == "int8":
        require(weight.group == i and not weight.nested, "bitsandbytes' int8 has one plain scale for an output: int8(group=None)")
        scales = weight.scales
        return {"weight": swap(weight.codes), "SCB": LazyTensor((o,), scales.dtype, lambda at: scales.read((slice(None), *at))[0])}
    require(weight.group in BLOCKS, f"bitsandbytes has blocks of {', '.join(map(str, BLOCKS))}, not of {weight.group}")
    n, nested, book = i // weight.group, weight.nested, _BOOKS[weight.format]
    state = {"quant_type": weight.format, "blocksize": weight.group, "dtype": weight.dtype_name, "shape": [o, i]}
    scales = weight.scales.codes if nested else swap(weight.scales)
    tensors = {
        "weight": made((o * i // 2, 1), np.uint8, lambda: _halves_swapped(weight.codes.read().T).reshape(-1, 1)),
        "weight.absmax": made((o * n,), scales.dtype, lambda: scales.read().reshape(-1)),
        "weight.quant_map": from_array(book),
    }
    if nested:
        mean = float(weight.scales.mean.read())
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": mean}
        tensors |= {"weight.nested_absmax": weight.scales.scales, "weight.nested_quant_map": from_array(codes.dynamic())}
    return tensors | {_STATE + weight.format: from_array(np.frombuffer(json.dumps(state).encode(), np.uint8))}
