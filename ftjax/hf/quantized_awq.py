"""AWQ's files (Lin et al. 2023, arXiv:2306.00978), layout "gemm": four bits with a scale and a zero for a group of rows of `[i, o]`.

    qweight int32 [i, o / 8]  eight columns a number: columns 0, 2, 4, 6, 1, 3, 5, 7 of eight from its lowest bits on
    qzeros int32 [n, o / 8]   packed alike
    scales float16 [n, o]

W[r, c] = (code[r, c] - zero[g, c]) · scale[g, c], read as `uint4`. Values are those of AutoAWQ in float16 bit for bit: the product is exact
in float32 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ftjax.hf.lazy import Index, LazyTensor
from ftjax.hf.quantized_gptq import group_of
from ftjax.hf.quantized_parts import Parts, spans
from ftjax.kernels.int4_matmul import pack
from ftjax.quant import QuantizedWeight

PARTS = re.compile(r"(.+)\.(qweight|qzeros|scales)")
OPTIONS: Mapping[str, tuple[Any, ...] | None] = {
    "bits": (4,),
    "group_size": None,
    "zero_point": (True,),
    "version": ("gemm", "GEMM", None),
    "format": ("gemm", None),
    "method": ("awq", None),
    "pack_dtype": ("int32", None),
    "dynamic": ({}, None),
    **dict.fromkeys("modules_to_not_convert backend meta lm_head desc_act do_fuse fuse_max_seq_len modules_to_fuse exllama_config".split()),
}
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each four bits of a number are."""


def read(parts: Parts) -> QuantizedWeight:
    """Return the matrix `[i, o]`, of lazy arrays.

    Raises:
      ValueError: a tensor is missing, misshapen or not what it should hold, or the rows do not divide into groups.
    """
    qweight = parts.take("qweight", None, [np.int32])
    if len(qweight.shape) != 2:
        raise parts.error("qweight", f"is {list(qweight.shape)}, expected [inputs, outputs / 8]")
    i, o = qweight.shape[0], 8 * qweight.shape[1]
    n = i // group_of(parts, "qweight", i)
    scales, zeros = parts.numbers("scales", [n, o]), parts.take("qzeros", [n, o // 8], [np.int32])

    def codes(index: Index) -> np.ndarray:
        (first, end), _ = spans(index, (i // 2, o))
        return pack(_unpacked(qweight, slice(2 * first, 2 * end), index[1]))

    return QuantizedWeight(
        LazyTensor((i // 2, o), np.dtype(np.uint8), codes),
        scales,
        LazyTensor((n, o), np.dtype(np.float32), lambda index: _unpacked(zeros, *index).astype(np.float32)),
        "uint4",
        parts.tensors["scales"].dtype.name,
    )


def _unpacked(tensor: LazyTensor, rows: slice, columns: slice) -> np.ndarray:
    """Return a block of what a tensor packs, uint8."""
    first, end = spans((columns,), (8 * tensor.shape[1],))[0]
    block = tensor.read((rows, slice(first // 8, -(-end // 8))))[..., None]
    found = (block >> np.arange(0, 32, 4, dtype=np.int32)) & 15
    return found[..., np.argsort(COLUMNS)].reshape(len(block), -1)[:, first % 8 :][:, : end - first].astype(np.uint8)
