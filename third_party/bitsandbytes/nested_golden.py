"""Write what bitsandbytes makes of the scales of matrices of many sizes: the mean that it removes, and sums of what is left.

Environment: Python 3.11, torch==2.13.0 (CPU), bitsandbytes==0.50.2, numpy.
Usage: python third_party/bitsandbytes/nested_golden.py tests/goldens/bitsandbytes_nested.json

A matrix [o, i] has one number in each block of 64, the others are 0: its scales are what is asked about. `offset` has the mean's bits,
`codes` and `absmax` the SHA-256 of the 8-bit codes of the scales and of the scales of those, which the plain PyTorch kernel gives, as in
golden.py. Of sizes that PyTorch splits between its threads the sum is that of one thread. With 2 and with 8 threads the mean of 262,144
scales is an ulp off in 11 and in 12 of 20 draws.
"""

import hashlib
import json
import pathlib
import sys

import bitsandbytes.functional as F
import numpy as np
import torch

SIZES = ((3, 64), (13, 64), (9, 256), (72, 256), (77, 832), (576, 576), (576, 1536), (1536, 576), (1024, 4160), (4096, 4096))


def matrix(o: int, i: int) -> np.ndarray:
    numbers = np.zeros((o, i), np.float32)
    scales = 2 + np.random.RandomState(o + i).standard_normal((o, i // 64)).astype(np.float16) * np.float32(0.4)
    numbers[:, ::64] = np.float32(0.02) * scales
    return numbers


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    nearest = torch.library.get_kernel("bitsandbytes::quantize_blockwise", "CUDA").call_boxed
    found = {}
    for size in SIZES:
        weight = torch.from_numpy(matrix(*size))
        _, plain = F.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        _, nested = F.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
        codes, absmax = nearest(torch._C._dispatch_keys(weight), plain.absmax - nested.offset, nested.state2.code, 256)
        offset = int(nested.offset.numpy().view(np.int32))
        found["x".join(map(str, size))] = {"offset": offset, "codes": digest(codes), "absmax": digest(absmax)}
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
