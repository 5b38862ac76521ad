"""Write what PEFT's LoftQ makes of a matrix: the base, and the factors, after three iterations.

    python third_party/peft/loftq_golden.py tests/goldens/peft_loftq.npz

Reference: peft 0.21.2, bitsandbytes 0.50.2, torch 2.13.0 (CPU), seed 0.

PEFT moves the matrix to a GPU before it begins; its functions are run here with that word replaced. The matrix is a torch `Linear`'s,
[o, i]; the scales are not nested, and A B is not divided by alpha / r.
"""

import inspect
import sys

import numpy as np
import torch
from peft.utils import loftq_utils

SHAPE, RANK, ITERATIONS, SEED = (24, 128), 4, 3, 0


def on_cpu(function):
    """Return a function of `loftq_utils` that stays on the CPU."""
    source = inspect.getsource(function).replace('"xpu" if is_xpu_available() else "cuda"', '"cpu"')
    exec(source, vars(loftq_utils))
    return vars(loftq_utils)[function.__name__]


def main() -> None:
    loftq_init = on_cpu(inspect.unwrap(loftq_utils.loftq_init))
    weight = torch.from_numpy(np.random.default_rng(SEED).standard_normal(SHAPE).astype(np.float32)) * 0.05
    found = {"weight": weight}
    found |= dict(zip(("base", "a", "b"), loftq_init(weight, 4, RANK, ITERATIONS), strict=True))
    np.savez_compressed(sys.argv[1], **{name: tensor.numpy() for name, tensor in found.items()})


if __name__ == "__main__":
    main()
