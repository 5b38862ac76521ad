"""What PEFT's merge_utils make of three task vectors: the golden file of tests/peft/vectors_test.py.

Run in an environment with peft==0.21.2 and torch==2.13.0: python third_party/peft/merge_golden.py
Writes tests/goldens/peft_vectors.npz. Random pruning is PEFT's own generator's and is not compared.
"""

import pathlib

import numpy as np
import torch
from peft.utils import merge_utils

OUT = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft_vectors.npz"


def main():
    torch.manual_seed(0)
    vectors = [torch.randn(7, 9) for _ in range(3)]
    factors = torch.tensor([0.5, 1.5, -0.25])
    found = {"vectors": torch.stack(vectors), "factors": factors, "linear": merge_utils.task_arithmetic(vectors, factors)}
    for density in (0.2, 0.5, 1.0):
        found[f"magnitude_prune_{density}"] = merge_utils.magnitude_prune(vectors, factors, density)
        for sign in ("total", "frequency"):
            found[f"ties_{density}_{sign}"] = merge_utils.ties(vectors, factors, density, sign)
    np.savez(OUT, **{name: value.numpy() for name, value in found.items()})


if __name__ == "__main__":
    main()
