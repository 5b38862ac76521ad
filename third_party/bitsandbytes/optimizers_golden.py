"""Write what bitsandbytes' block-wise 8-bit AdamW and Lion do to a matrix in a few steps: parameters, codes and scales.

Environment: Python 3.11, torch==2.13.0 (CPU), bitsandbytes==0.50.2, safetensors, numpy.
Usage: python third_party/bitsandbytes/optimizers_golden.py tests/goldens/bitsandbytes_optimizers.safetensors

The gradients have blocks of very different size, and some zeros. The states are quantised by bitsandbytes' plain PyTorch kernel, which
takes the nearest number of the code, in place of the C++ kernel with a coarser table (see golden.py). The last block is not full.
"""

import sys

import bitsandbytes as bnb
import bitsandbytes.functional as F
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops
from safetensors.torch import save_file

SHAPE, STEPS, SEED = (33, 126), 3, 0
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def nearest(numbers: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, found: torch.Tensor, block: int) -> None:
    kernel = torch.library.get_kernel("bitsandbytes::quantize_blockwise", "CUDA").call_boxed  # the plain one, as no GPU is here
    codes, largest = kernel(torch._C._dispatch_keys(numbers), numbers, code, block)
    found.copy_(codes)
    absmax.copy_(largest)


def main() -> None:
    ops._quant_blockwise_fp32_direct = nearest
    rng = np.random.default_rng(SEED)
    gradients = rng.standard_normal((STEPS, *SHAPE)) * np.exp(rng.standard_normal((SHAPE[0], 1)) * 2)
    gradients[:, 5, 10:50] = 0
    gradients = torch.from_numpy(gradients.astype(np.float16))
    start = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float16))
    found = {"start": start, "gradients": gradients, "unsigned": F.create_dynamic_map(signed=False)}
    for name, optimizer in (("adamw", bnb.optim.AdamW8bit), ("lion", bnb.optim.Lion8bit)):
        parameter = torch.nn.Parameter(start.float())
        rule = optimizer([parameter], **OPTIONS)
        for gradient in gradients.float():
            parameter.grad = gradient.clone()
            rule.step()
        state = rule.state[parameter]
        found |= {f"{name}/{field}": state[field] for field in ("state1", "state2", "absmax1", "absmax2") if state.get(field) is not None}
        found[f"{name}/end"] = parameter.data
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
