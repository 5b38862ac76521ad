"""The TPU kernel, run by the interpreter of Pallas on a CPU: several tiles on every axis of the grid, in both directions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ftjax import weights
from ftjax.kernels import int4_matmul
from ftjax.kernels.int4_matmul import Implementation, implementations, reference, tpu
from ftjax.quant import SPECS, QuantizedWeight, quantize

TILES = tpu.Tiles(192, 256, 128)
CASES = [  # every format and group, both dtypes
    ("nf4", 64, jnp.bfloat16),
    ("fp4", 32, jnp.float32),
    ("int4", 128, jnp.bfloat16),
    ("uint4", 512, jnp.float32),  # the whole column, of two tiles
    ("int8", 512, jnp.bfloat16),
    ("uint8", 64, jnp.float32),
]


def test_every_format_is_among_them():
    assert {format for format, *_ in CASES} == set(SPECS)


def packed(format, shape, group, dtype=jnp.float32):
    """A matrix of random bytes: all codes, and scales of both signs."""
    i, o, random = *shape, np.random.default_rng(0)
    low = {"int8": -127, "uint8": -128}.get(format)
    codes = random.integers(0, 256, (i // 2, o), np.uint8) if low is None else random.integers(low, 128, (i, o), np.int8)
    scales = random.normal(size=(i // group, o)).astype(np.float32)
    span = {"uint4": (0, 16), "uint8": (-128, 128)}.get(format)
    zeros = None if span is None else jnp.asarray(random.integers(*span, scales.shape).astype(np.float32))
    return QuantizedWeight(jnp.asarray(codes), jnp.asarray(scales), zeros, format, jnp.dtype(dtype).name)


def rows(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32)).astype(dtype)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def through(implementation, x, y, w, monkeypatch):
    """Return `x D(w)` and the gradient for the cotangent y, as a model gets them, with an implementation in the place of all others."""
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", {"only": implementation})

    def both(x, y, w):
        out, pullback = jax.vjp(lambda x: weights.dot(x, w), x)
        return out, pullback(y)[0]

    return jax.jit(both)(x, y, w)


@pytest.mark.parametrize(("format", "group", "dtype"), CASES, ids=[case[0] for case in CASES])
def test_product_and_gradient_are_those_of_the_matrix_and_tiles_equal_it_bit_for_bit(format, group, dtype, monkeypatch):
    """On grids of 3 x 3 x 2 and 3 x 2 x 3, the last rows ragged."""
    w = packed(format, (512, 384), group, dtype)
    ones = jnp.eye(512, dtype=dtype)  # rows of it pick rows of the matrix, for a sum with one number is exact
    x, y = jnp.concatenate([ones, rows((50, 512), dtype)]), rows((562, 384), dtype)
    forms = (partial(form, tiles=TILES, interpret=True) for form in (tpu.product, tpu.product_transposed))
    out, gradient = through(Implementation(*forms), x, y, w, monkeypatch)
    dense = np.asarray(w.materialize(), np.float64)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_array_equal(out[:512], dense.astype(out.dtype))
    assert relative(out, np.asarray(x, np.float64) @ dense) < tolerance
    assert relative(gradient, np.asarray(y, np.float64) @ dense.T) < tolerance


def test_a_gradient_that_is_zero_or_of_the_wrong_matrix_would_be_found(monkeypatch):
    w, x, y = packed("int4", (64, 64), 32), rows((12, 64)), rows((12, 64))
    expected = np.asarray(y, np.float64) @ np.asarray(w.materialize(), np.float64).T
    right = reference.product_transposed
    for form, found in ((right, False), (reference.product, True), (lambda spec, y, w: 0 * y, True)):
        gradient = through(Implementation(reference.product, form), x, y, w, monkeypatch)[1]
        assert bool(relative(gradient, expected) > 1e-5) is found


@pytest.mark.parametrize("form", [tpu.product, tpu.product_transposed], ids=["product", "transposed"])
def test_nothing_is_read_before_it_is_written_and_what_is_summed_is_not_parallel(form):
    """On grids of 3 x 2 x 3 and 3 x 3 x 2. This interpreter fills vector memory with NaN, and takes parallel axes in a random order."""
    w = packed("nf4", (192, 256), 32)
    dense = np.asarray(w.materialize(), np.float64)
    dense = dense if form is tpu.product else dense.T
    x = rows((20, dense.shape[0]))
    found = form(w._spec, x, w._packed(), tiles=tpu.Tiles(8, 64, 128), interpret=pltpu.InterpretParams(random_seed=0))
    assert relative(found, np.asarray(x, np.float64) @ dense) < 1e-5


@pytest.mark.parametrize(
    ("shape", "group", "rows", "expected"),
    [
        ((4096, 14336), 64, 8192, (1024, 512, 512)),
        ((14336, 4096), 64, 5000, (1008, 512, 512)),
        ((4096, 4096), 4096, 1, (1, 512, 1024)),
        ((576, 192), 64, 700, (700, 576, 192)),
        ((11008, 4096), 128, 2048, (1024, 256, 512)),
        ((1536, 8960), 96, 64, (64, 384, 256)),
    ],
)
def test_tiles_divide_the_matrix_its_groups_and_vector_memory(shape, group, rows, expected):
    tiles = tpu.choose(rows, *shape, group)
    assert tiles == expected
    assert not shape[0] % tiles.i and not shape[1] % tiles.o and (tiles.i % group == 0 or group % tiles.i == 0)
    assert tpu.vmem(SPECS["uint4"], tiles, group, jnp.float32) < 40 * 2**20


@pytest.mark.parametrize(
    ("shape", "group", "dtype", "reason"),
    [
        ((64, 64), 16, jnp.float32, "groups of a multiple of 32 rows are expected, not of 16"),
        ((64, 64), 32, jnp.float16, "bfloat16 or float32 is expected, not float16"),
        ((64, 2100), 32, jnp.float32, r"a multiple of 128 divides, or of at most 2048, are expected, not \[64, 2100\]"),
    ],
)
def test_a_product_that_the_kernel_cannot_take_has_a_reason(shape, group, dtype, reason):
    w = jax.eval_shape(partial(quantize, group=group), jax.ShapeDtypeStruct(shape, jnp.float32))
    ask = partial(int4_matmul.choice, w._spec, 8, w._packed(), dtype, platform="tpu")
    assert ask().name == "reference" and set(ask().passed) >= {"tpu"}
    with pytest.raises(ValueError, match=f"'tpu' cannot take this product: .*{reason}"):
        ask(implementation="tpu")


def test_on_another_platform_a_forced_kernel_says_why_not_and_auto_takes_one_that_can():
    w, x = packed("nf4", (128, 128), 64), rows((4, 128))
    product = partial(int4_matmul.product, x, w._packed(), w._spec)
    with pytest.raises(ValueError, match="'tpu' cannot take this product: it runs on tpu, and the program is for another platform"):
        jax.jit(partial(product, implementation="tpu")).lower()
    np.testing.assert_array_equal(product(), product(implementation="reference"))
    with pytest.raises(ValueError, match="no implementation 'tpus'; nearest: .*'tpu'"):
        product(implementation="tpus")
