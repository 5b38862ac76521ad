"""What the formats lose of numbers of several distributions, and of a model's matrices.

Usage: python experiments/quant_error/table.py [MODEL]

Prints a table of ‖D(W) - W‖ / ‖W‖: of 512 x 512 numbers, and of the matrices of a model (a folder or a .gguf file), the mean over kinds and
layers.
"""

import argparse

import jax
import jax.numpy as jnp

from ftjax import quant
from ftjax.hf import load
from ftjax.quant import sensitivity

FORMATS = {
    "nf4": ("nf4", {}),
    "nf4, nested scales": ("nf4", {"nested": True}),
    "fp4": ("fp4", {}),
    "int4": ("int4", {}),
    "uint4, with zero points": ("uint4", {}),
    "nf4, groups of 32": ("nf4", {"group": 32}),
    "int4, groups of 32": ("int4", {"group": 32}),
    "int8, one scale a column": ("int8", {"group": None}),
}
DISTRIBUTIONS = {
    "normal": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1),
    "Laplace": jax.random.laplace,
    "Student's t, 5": lambda key, shape: jax.random.t(key, 5.0, shape),
}
SHAPE = (512, 512)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    args = parser.parse_args()
    params = load.load(args.model, dtype="float32").params if args.model else None
    columns = [*DISTRIBUTIONS, *(["the model"] if params else [])]
    print(f"| format, groups of 64 | bits | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    drawn = [draw(jax.random.key(0), SHAPE) for draw in DISTRIBUTIONS.values()]
    for name, (format, options) in FORMATS.items():
        errors = [error(w, format, options) for w in drawn]
        if params:
            rows = sensitivity.report(params, format, **options)
            errors.append(sum(row.error for row in rows) / len(rows))
        print(f"| {name} | {bits(format, options):.3f} | {' | '.join(f'{x:.4f}' for x in errors)} |", flush=True)


def error(w: jax.Array, format: str, options: dict) -> float:
    return float(sensitivity.relative_errors(w, quant.quantize(w, format, **options).materialize()))


def bits(format: str, options: dict) -> float:
    """Return the bits of a number of a large matrix, scales and all."""
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    packed = jax.eval_shape(lambda w: quant.quantize(w, format, **options), w)
    return 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed)) / w.size


if __name__ == "__main__":
    main()
