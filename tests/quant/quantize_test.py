"""Codes and scales are those of bitsandbytes, bit for bit; what they stand for is near what was quantised."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import quant, tree
from ftjax.quant import codes
from ftjax.quant.quantize import quantize

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = load_file(GOLDENS / "bitsandbytes.safetensors")
NESTED = json.loads((GOLDENS / "bitsandbytes_nested.json").read_text())
O, I = GOLDEN["weight"].shape  # noqa: E741
ROWS = 8
FORMATS = list(quant.SPECS)


def golden_matrix():
    return jnp.asarray(GOLDEN["weight"].astype(np.float32).T)


def test_the_dynamic_code_is_theirs():
    np.testing.assert_array_equal(codes.dynamic(), GOLDEN["dynamic"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_theirs(kind):
    ours = quantize(golden_matrix(), kind)
    theirs = GOLDEN[f"{kind}/codes"].reshape(O, I // 2).T
    np.testing.assert_array_equal(ours.codes, (theirs >> 4) | (theirs & 15) << 4)  # the first of two in their high half, in our low one
    np.testing.assert_array_equal(ours.scales.T.reshape(-1), GOLDEN[f"{kind}/absmax"])
    np.testing.assert_array_equal(ours.materialize().T[:ROWS], GOLDEN[f"{kind}/values"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_scales_are_theirs(kind):
    ours = quantize(golden_matrix(), kind, nested=True)
    np.testing.assert_array_equal(ours.scales.codes.reshape(-1), GOLDEN[f"{kind}/nested/absmax"])
    np.testing.assert_array_equal(ours.scales.scales, GOLDEN[f"{kind}/nested/absmax_absmax"])
    np.testing.assert_array_equal(ours.scales.mean, GOLDEN[f"{kind}/nested/offset"][0])
    np.testing.assert_array_equal(ours.materialize().T[:ROWS], GOLDEN[f"{kind}/nested/values"])


@pytest.mark.parametrize("size", NESTED)
def test_nested_scales_are_theirs_at_every_size(size):
    """Of each the mean differs if it is added in another order, or if the compiler makes a product with 1 / n of its quotient."""
    o, i = map(int, size.split("x"))
    scales = 2 + np.random.RandomState(o + i).standard_normal((o, i // 64)).astype(np.float16) * np.float32(0.4)
    weight = np.zeros((i, o), np.float32)
    weight[::64] = (np.float32(0.02) * scales).T
    nested = jax.jit(lambda w: quantize(w, "nf4", nested=True).scales)(weight)
    found = {"codes": np.asarray(nested.codes), "absmax": np.asarray(nested.scales)}
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in found.items()}
    assert {"offset": int(np.asarray(nested.mean).view(np.int32)), **digests} == NESTED[size]


def test_eight_bits_are_theirs():
    ours = quantize(golden_matrix(), "int8", group=None)
    np.testing.assert_array_equal(ours.codes.T, GOLDEN["int8/codes"])
    np.testing.assert_array_equal(ours.scales[0], GOLDEN["int8/absmax"])
    np.testing.assert_array_equal(ours.materialize().T[:ROWS], GOLDEN["int8/values"])


@pytest.mark.parametrize(
    ("format", "error"), [("nf4", 0.0922), ("fp4", 0.1219), ("int4", 0.1076), ("uint4", 0.0911), ("int8", 0.0059), ("uint8", 0.0053)]
)
def test_the_error_on_normal_numbers_is_the_formats(format, error, key):
    w = jax.random.normal(key, (3, 256, 192))
    assert float(jnp.sqrt(jnp.mean(jnp.square(quantize(w, format).materialize() - w)))) == pytest.approx(error, rel=0.02)


def test_nf4_loses_least_of_normal_and_heavy_tailed_numbers_and_integers_of_uniform_ones(key):
    """Of four bits and one scale for 64. The values are those of another implementation, on other draws."""
    shape = (256, 192)
    draws = {"normal": jax.random.normal(key, shape), "t5": jax.random.t(key, 5.0, shape), "uniform": jax.random.uniform(key, shape) - 0.5}

    def error(name, format):
        return float(jnp.linalg.norm(quantize(draws[name], format).materialize() - draws[name]) / jnp.linalg.norm(draws[name]))

    for name in ("normal", "t5"):
        assert error(name, "nf4") < error(name, "int4") < error(name, "fp4")
    assert error("uniform", "int4") < error("uniform", "nf4")
    expected = {("normal", "nf4"): 0.0919, ("normal", "int4"): 0.1080, ("t5", "nf4"): 0.1054, ("t5", "int4"): 0.1479}
    assert {case: error(*case) for case in expected} == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [32, 128, None])
def test_what_is_quantised_again_stays_as_it_is(format, group, key):
    once = quantize(jax.random.normal(key, (2, 128, 6)), format, group=group).materialize()
    again = quantize(once, format, group=group).materialize()
    np.testing.assert_allclose(again, once, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_its_layers_and_zeros_are_zeros(format, key):
    w = jax.random.normal(key, (2, 128, 6)).at[1, :64].set(0)
    stacked = quantize(w, format)
    for layer in range(2):
        alone, one = quantize(w[layer], format), jax.tree.map(lambda x, layer=layer: x[layer], stacked)
        np.testing.assert_array_equal(one.materialize(), alone.materialize())
    np.testing.assert_array_equal(stacked.materialize()[1, :64], 0)


def test_nf4_with_nested_scales_takes_4_127_bits_a_number():
    shapes = jax.eval_shape(lambda w: quantize(w, "nf4", nested=True), jax.ShapeDtypeStruct((4, 4096, 4096), jnp.bfloat16))
    assert 8 * tree.num_bytes(shapes) / (4 * 4096**2) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((128, 6), {"format": "nf5"}, "no format 'nf5'; nearest: 'nf4'"),
        ((100, 6), {"group": 64}, "100 rows .* groups of 64"),
        ((99, 6), {"group": None}, "an even number"),
        ((128,), {}, "a matrix"),
    ],
)
def test_what_cannot_be_quantised_is_said(shape, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones(shape), **options)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("format", quant.METHODS)
def test_a_number_that_is_not_finite_is_refused_where_it_can_be_seen(format, value, key):
    params = {"layers": {"up_proj": {"kernel": jax.random.normal(key, (3, 128, 6)).at[1, 5, 3].set(value)}}}
    method = quant.METHODS[format]()
    with pytest.raises(ValueError, match=rf"{format}: 'layers/up_proj/kernel' holds numbers that are not finite, in layers \[1\]"):
        method.init(key, params)
    jax.eval_shape(method.init, key, params)
