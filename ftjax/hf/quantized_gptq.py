"""GPTQ's files (Frantar et al. 2022, arXiv:2210.17323): 4 or 8 bits, with a scale and a zero for a group of rows of `[i, o]`.

    qweight int32 [i / 8, o]  eight rows a number (of 8 bits four), the first in the lowest bits
    qzeros int32 [n, o / 8]   as many columns a number; less one, modulo 16 (256), in the format "gptq", as they are in "gptq_v2"
    scales float16 [n, o]
    g_idx int32 [i]           the group of each row, where "desc_act" sorted them

W[r, c] = (code[r, c] - zero[g, c]) · scale[g, c]. Values are those of AutoGPTQ in float16 bit for bit: the product is exact in float32 and
rounded once. Symmetric files, whose zeros are all 8 (128), are read as `int4` or as `uint8` without zeros, others as `uint4` or `uint8`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ftjax.hf.lazy import Index, LazyTensor, cast, from_array
from ftjax.hf.quantized_parts import Parts, made, mapped, plain, require, spans
from ftjax.kernels.int4_matmul import pack
from ftjax.quant import SPECS, QuantizedWeight
from ftjax.quant.permuted import PermutedWeight

PARTS = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx)")
OPTIONS: Mapping[str, tuple[Any, ...] | None] = {
    "bits": (4, 8),
    "group_size": None,
    "sym": (True, False),
    "desc_act": (True, False),
    "checkpoint_format": ("gptq", "gptq_v2", None),
    "format": ("gptq", "gptq_v2", None),
    "method": ("gptq", None),
    "pack_dtype": ("int32", None),
    "is_marlin_format": (False, None),
    "dynamic": ({}, None),
    "adapter": ({}, None),
    "rotation": (None,),
    "lm_head": None,
    **dict.fromkeys(
        "damp_percent damp_auto_increment static_groups true_sequential act_group_aware hyb_act mse model_name_or_path "
        "model_file_base_name meta dataset tokenizer backend block_name_to_quantize module_name_preceding_first_block batch_size "
        "pad_token_id max_input_length model_seqlen cache_block_outputs modules_in_block_to_quantize modules_to_not_convert use_exllama "
        "disable_exllama exllama_config use_cuda_fp16 parallel_packing offload_to_disk gptaq foem".split()
    ),
}

_LITTLE = np.dtype("<i4")


def read(parts: Parts) -> QuantizedWeight | PermutedWeight:
    """Return the matrix `[i, o]`, of lazy arrays.

    Raises:
      ValueError: a tensor is missing, misshapen or not what it should hold, or the rows do not divide into groups.
    """
    qweight, bits = parts.take("qweight", None, [np.int32]), parts.settings.get("bits", 4)
    each = 32 // bits
    if len(qweight.shape) != 2 or qweight.shape[1] % each:
        raise parts.error("qweight", f"is {list(qweight.shape)}, expected [inputs / {each}, outputs] with outputs divisible by {each}")
    i, o = each * qweight.shape[0], qweight.shape[1]
    group = group_of(parts, "qweight", i)
    n = i // group
    scales = parts.numbers("scales", [n, o])
    codes, zeros, format = _codes(qweight), _zeros(parts, n, o, bits), "uint4"
    if symmetric := parts.settings.get("sym", True):
        middle = 1 << (bits - 1)
        if not np.all(zeros.read() == middle):
            raise parts.error("qzeros", f"are not all {middle}, as sym=true says: the file is damaged, or checkpoint_format is another")
    if bits == 8:
        codes, format = mapped(_signed, codes, np.int8), "uint8"
        zeros = None if symmetric else mapped(lambda array: array - np.float32(128), zeros)
    elif symmetric:
        codes, zeros, format = mapped(_toggled, codes), None, "int4"
    weight = QuantizedWeight(codes, scales, zeros, format, parts.tensors["scales"].dtype.name)
    order = _order(parts, i, group) if "g_idx" in parts.tensors else None
    if order is None:
        return weight
    return PermutedWeight(QuantizedWeight(_sorted(codes, order), scales, zeros, format, weight.dtype_name), from_array(order))


def group_of(parts: Parts, part: str, i: int) -> int:
    """Return how many of a matrix's rows share a scale."""
    size = parts.settings.get("group_size", 128)
    group = i if size == -1 else size
    if not isinstance(group, int) or group < 2 or i % group or group % 2:
        raise parts.error(part, f"has {i} rows, which do not divide into groups of group_size={size}, an even number")
    return group


def _toggled(codes: np.ndarray) -> np.ndarray:
    """Return codes less 8 in two's complement, or the other way."""
    return codes ^ np.uint8(0x88)


def _signed(codes: np.ndarray) -> np.ndarray:
    """Return bytes less 128."""
    return (codes ^ np.uint8(0x80)).view(np.int8)


def _codes(qweight: LazyTensor) -> LazyTensor:
    """Return uint8 `[i/2, o]`, of 8 bits `[i, o]`: the bytes of a number are four of our rows, in order."""
    shape = (4 * qweight.shape[0], qweight.shape[1])

    def fetch(index: Index) -> np.ndarray:
        (first, end), _ = spans(index, shape)
        block = np.ascontiguousarray(qweight.read((slice(first // 4, -(-end // 4)), index[1])), _LITTLE)
        rows = np.moveaxis(block.view(np.uint8).reshape(*block.shape, 4), 2, 1).reshape(-1, block.shape[1])
        return rows[first % 4 :][: end - first]

    return LazyTensor(shape, np.dtype(np.uint8), fetch)


def _zeros(parts: Parts, n: int, o: int, bits: int) -> LazyTensor:
    """Return float32 `[n, o]`."""
    tensor = parts.take("qzeros", [n, o * bits // 32], [np.int32])
    format = parts.settings.get("checkpoint_format") or parts.settings.get("format") or "gptq"

    def whole() -> np.ndarray:
        numbers = tensor.read()[..., None] >> np.arange(0, 32, bits, dtype=np.int32)
        return ((numbers.reshape(n, o) + (format == "gptq")) & ((1 << bits) - 1)).astype(np.float32)

    return made((n, o), np.float32, whole)


def _order(parts: Parts, i: int, group: int) -> np.ndarray | None:
    """Return the rows sorted by their groups, or None where they are."""
    groups = parts.take("g_idx", [i], [np.int32, np.int64]).read()
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], np.arange(i) // group):
        raise parts.error("g_idx", f"does not give each of {i // group} groups {group} rows")
    return None if np.array_equal(order, np.arange(i)) else order


def _sorted(codes: LazyTensor, order: np.ndarray) -> LazyTensor:
    """Return rows in another order, packed ones or those of signed bytes."""

    def fetch(index: Index) -> np.ndarray:
        block = codes.read((slice(None), index[1]))
        return (block[order] if block.dtype == np.int8 else pack(unpack(block)[order]))[index[0]]

    return LazyTensor(codes.shape, codes.dtype, fetch)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return the codes of `pack`, `[i/2, o] -> [i, o]`, on the host."""
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])


def settings(weights: Mapping[str, QuantizedWeight | PermutedWeight], dense: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a folder with these matrices; `dense` are the modules left as they are."""
    formats, matrices = {plain(weight).format for weight in weights.values()}, [plain(weight) for weight in weights.values()]
    require(len(formats) == 1, f"GPTQ has one format in a model, not {' and '.join(sorted(formats))}")
    format, groups = formats.pop(), {weight.group for weight in matrices}
    whole = all(weight.group == weight.shape[-2] for weight in matrices)
    require(len(groups) == 1 or whole, f"GPTQ has one group_size in a model, not {', '.join(map(str, sorted(groups)))}")
    zeros = {weight.zeros is not None for weight in matrices}
    require(len(zeros) == 1, "GPTQ has zeros in all matrices of a model, or in none")
    symmetric = zeros == {False}
    return {
        "quant_method": "gptq",
        "bits": SPECS[format].bits,
        "group_size": -1 if whole else groups.pop(),
        "sym": symmetric,
        "desc_act": any(isinstance(weight, PermutedWeight) for weight in weights.values()),
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "modules_to_not_convert": sorted(dense) or None,
    }


def write(weight: QuantizedWeight | PermutedWeight) -> dict[str, LazyTensor]:
    """Return the tensors of a matrix, by what follows the module's name; scales are float16 where that is exact, and float32 elsewhere.

    Raises:
      Unfit: the layout has no place for it.
    """
    base = plain(weight)
    require(base.format in ("int4", "uint4", "uint8"), f"GPTQ has int4, uint4 and uint8, not {base.format}")
    bits = SPECS[base.format].bits
    each = 32 // bits
    require(not base.nested, "GPTQ has no nested scales")
    (i, o), n = base.shape, base.shape[-2] // base.group
    require(i % each == 0 and o % each == 0, f"GPTQ packs {each} rows and {each} columns a number, and {i} x {o} do not divide")
    scales = base.scales.read()
    dtype = np.float16 if np.array_equal(scales.astype(np.float16).astype(np.float32), scales) else np.float32
    order = weight.order.read() if isinstance(weight, PermutedWeight) else np.arange(i)
    return {
        "qweight": made((i // each, o), np.int32, lambda: _qweight(base, order)),
        "qzeros": made((n, o // each), np.int32, lambda: _qzeros(base, bits)),
        "scales": cast(base.scales, dtype),
        "g_idx": from_array((np.argsort(order) // base.group).astype(np.int32)),
    }


def _qweight(base: QuantizedWeight, order: np.ndarray) -> np.ndarray:
    packed, rows = base.codes.read(), np.argsort(order)
    if base.format == "uint8":
        packed = packed.view(np.uint8)[rows] ^ np.uint8(0x80)
    else:
        packed = pack(unpack(_toggled(packed) if base.format == "int4" else packed)[rows])
    rows = np.moveaxis(packed.reshape(-1, 4, packed.shape[1]), 1, 2)
    return np.ascontiguousarray(rows).view(_LITTLE)[..., 0].astype(np.int32)


def _qzeros(base: QuantizedWeight, bits: int) -> np.ndarray:
    """Return zeros as "gptq_v2" packs them, or all in the middle as "gptq" does."""
    if base.zeros is None:
        shape = (base.scales.shape[-2], base.scales.shape[-1] * bits // 32)
        return np.full(shape, {4: 0x77777777, 8: 0x7F7F7F7F}[bits], np.int32)
    zeros = base.zeros.read() + (128 if bits == 8 else 0)
    zeros = zeros.astype(np.uint32).reshape(len(zeros), -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(zeros, axis=-1).view(np.int32)
