"""Write what bitsandbytes makes of a matrix: packed codes, scales, scales of scales, and the numbers that they stand for.

Environment: Python 3.11, torch==2.13.0 (CPU), bitsandbytes==0.50.2, safetensors, numpy.
Usage: python third_party/bitsandbytes/golden.py tests/goldens/bitsandbytes.safetensors

The matrix is a torch `Linear`'s, [o, i], of half-precision numbers: normal with a few outliers, one block of zeros, one with a single
number.

Scales are quantised by bitsandbytes' plain PyTorch kernel, which takes the nearest number of the dynamic code as its CUDA kernel does. The
C++ kernel that float32 gets on a CPU looks the code up in a coarser table and may take the neighbour within about 1e-5 of a midpoint
(1 of 288 scales here); `absmax_table` is what that one gives.
"""

import sys

import bitsandbytes.functional as F
import numpy as np
import torch
from safetensors.torch import save_file

SHAPE, SEED = (72, 256), 0
ROWS = 8  # of the values that are written


def main() -> None:
    rng = np.random.default_rng(SEED)
    matrix = rng.standard_normal(SHAPE) * 0.05
    matrix[rng.integers(0, 72, 6), rng.integers(0, 256, 6)] *= 20
    matrix[3, 64:128] = 0
    matrix[4, 64:128] = 0
    matrix[4, 70] = -0.25
    weight = torch.from_numpy(matrix.astype(np.float16)).float()
    found = {"weight": weight.half(), "dynamic": F.create_dynamic_map()}
    keys = torch._C._dispatch_keys(weight)
    nearest = torch.library.get_kernel("bitsandbytes::quantize_blockwise", "CUDA").call_boxed  # the same, as no GPU is here
    for kind in ("nf4", "fp4"):
        found[f"{kind}/code"] = F.get_4bit_type(kind, "cpu")
        packed, state = F.quantize_4bit(weight, quant_type=kind, blocksize=64)
        found[f"{kind}/codes"], found[f"{kind}/absmax"] = packed, state.absmax
        found[f"{kind}/values"] = F.dequantize_4bit(packed, state)[:ROWS]
        _, nested = F.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=True)
        found[f"{kind}/nested/absmax_table"] = nested.absmax
        nested.absmax, nested.state2.absmax = nearest(keys, state.absmax - nested.offset, nested.state2.code, 256)
        found[f"{kind}/nested/absmax"], found[f"{kind}/nested/absmax_absmax"] = nested.absmax, nested.state2.absmax
        found[f"{kind}/nested/offset"] = nested.offset.reshape(1)
        found[f"{kind}/nested/values"] = F.dequantize_4bit(packed, nested)[:ROWS]
    codes, scales, _ = F.int8_vectorwise_quant(weight.half())
    found["int8/codes"], found["int8/absmax"] = codes, scales
    found["int8/values"] = F.int8_vectorwise_dequant(codes, scales)[:ROWS]
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
