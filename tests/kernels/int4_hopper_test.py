"""Hopper's kernels: lowered for an H100 on any machine, run by the GPU interpreter of JAX 0.12, and on a GPU where there is one."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from ftjax import weights
from ftjax.kernels import int4_matmul
from ftjax.kernels.int4_matmul import Packed, decode, hopper, hopper_kernels, hopper_registers, hopper_tiles
from ftjax.kernels.int4_matmul.hopper_tiles import Tile, forward_bytes, forward_tile, transposed_bytes, transposed_tile
from ftjax.quant import SPECS, QuantizedWeight, quantize
from ftjax.quant.hopper import HopperWeight, for_device, for_hopper

FORMATS = ["nf4", "fp4", "int4", "uint4"]
H100, A100 = (jax.sharding.AbstractDevice(f"NVIDIA {name}", cores, "cuda") for name, cores in (("H100 80GB HBM3", 132), ("A100", 108)))
interpreted = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="the GPU interpreter of JAX 0.10 runs no tiled memory")


def interpreter():
    return plgpu.InterpretGPUParams(detect_races=True)


def on(device):
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def lowered(function, *args):
    with on(H100):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*args)


def shapes(format, i, o, group, layout=decode.by_outputs):
    """A matrix for Hopper of which only shapes exist."""
    n = i // group
    scales = jax.ShapeDtypeStruct((n, o), jnp.float32)
    packed = Packed(jax.ShapeDtypeStruct((i // 2, o), jnp.uint8), scales, scales if format == "uint4" else None)
    return jax.eval_shape(layout, packed)


def rows(m, size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((m, size), dtype)


def matrix(key, format, i, o, group):
    """A matrix for Hopper, and what it stands for in float64."""
    w = quantize(jax.random.normal(key, (i, o), jnp.bfloat16), format, group=group)
    return for_hopper(w)._packed(), SPECS[format], np.asarray(w.materialize(), np.float64)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("format", "m", "i", "o", "group"),
    [("nf4", 300, 512, 256, 64), ("int4", 1, 2048, 256, 64), ("uint4", 16, 576, 192, 576), ("fp4", 64, 256, 128, 32)],
    ids=["many rows", "decoding, in splits", "zeros, one warpgroup", "small groups"],
)
def test_a_product_and_its_gradient_lower_for_an_h100(format, m, i, o, group):
    def both(x, y, w):
        found, pullback = jax.vjp(lambda x: int4_matmul.product(x, w, SPECS[format], implementation="gpu"), x)
        return found, *pullback(y)

    program = lowered(both, rows(m, i), rows(m, o), shapes(format, i, o, group))
    text = program.mlir_module()
    assert [out.shape for out in program.out_avals] == [(m, o), (m, i)]
    assert text.count("@mosaic_gpu_v2") == 2
    assert not any(f"tensor<{a}x{b}x{dtype}>" in text for a, b in ((i, o), (o, i)) for dtype in ("bf16", "f32"))


def test_an_automatic_choice_takes_the_kernel_on_an_h100_and_says_why_not():
    with on(H100):
        choose = functools.partial(int4_matmul.choice, SPECS["nf4"], 16, dtype=jnp.bfloat16, platform="cuda")
        assert choose(w=shapes("nf4", 256, 128, 64)).name == "gpu"
        by_rows = choose(w=shapes("nf4", 256, 128, 64, layout=lambda w: w))
    assert by_rows.name == "reference" and "for_hopper" in by_rows.passed["gpu"]


@pytest.mark.parametrize(
    ("reason", "arguments"),
    {
        "4 bits": {"format": "int8"},
        "multiples of 64": {"o": 100},
        "groups of 32": {"group": 16},
        "for_hopper": {"layout": lambda w: w},
        "bfloat16": {"dtype": jnp.float32},
        "no rows": {"m": 0},
        "A100": {"device": A100},
    }.items(),
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_what_the_kernels_cannot_take_has_a_reason(reason, arguments):
    def unfit(format="nf4", m=4, o=128, group=64, layout=decode.by_outputs, dtype=jnp.bfloat16, device=H100):
        with on(device):
            return hopper.unfit(SPECS[format], m, shapes(format, 256, o, group, layout), dtype)

    assert unfit() is None and reason in unfit(**arguments)


@pytest.mark.parametrize("kernel", ["forward", "transposed"])
def test_shared_memory_is_counted_to_the_byte_and_stays_within_the_limit(kernel):
    """One stage more than there is room for does not lower, and the largest number that the count allows does."""
    tile, count = (Tile(256, 2, 64), forward_bytes) if kernel == "forward" else (Tile(128, 2, 64, columns=128), transposed_bytes)
    room = [stages for stages in range(1, 20) if count(tile._replace(stages=stages), 64, 1) <= hopper_tiles.SHARED_BYTES - 1024]
    w = shapes("int4", 1024, 1024, 64)

    def program(stages):
        run = functools.partial(getattr(hopper_kernels, kernel), book=SPECS["int4"].book, tile=tile._replace(stages=stages))
        return lowered(lambda x, codes, scales: run(x, codes, (scales,)), rows(256, 1024), w.codes, w.scales)

    program(room[-1])
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        program(room[-1] + 1)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("i", "o"), [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (4096, 1024), (576, 192), (1536, 576)])
def test_tiles_divide_every_matrix(i, o, group):
    group = group or i
    if i % group:
        pytest.skip("no whole groups")
    for m in (1, 16, 100, 2048):
        tile = forward_tile(m, i, o, group=group, sides=2)
        assert o % (tile.warpgroups * 64) == 0 and i % (tile.splits * tile.depth) == 0
        assert tile.depth % group == 0 or group % tile.depth == 0
        assert tile.rows < 2 * max(m, 8) and forward_bytes(tile, group, 2) < hopper_tiles.SHARED_BYTES
        back = transposed_tile(m, i, o, group=group, sides=2)
        assert i % (back.warpgroups * back.columns) == 0 and transposed_bytes(back, group, 2) < hopper_tiles.SHARED_BYTES


def test_few_rows_are_split_until_they_fill_the_gpu():
    tile = forward_tile(16, 4096, 4096, group=64, sides=1)
    assert tile.rows == 16 and 100 <= 4096 // (64 * tile.warpgroups) * tile.splits <= hopper_tiles.MULTIPROCESSORS


@pytest.mark.parametrize("format", ["nf4", "uint4"])
def test_a_matrix_laid_out_for_hopper_is_the_same_matrix(format, key):
    w = quantize(jax.random.normal(key, (2, 128, 64), jnp.bfloat16), format, group=32)
    laid = for_hopper({"a": w, "b": jnp.ones(3), "c": quantize(jnp.ones((64, 64)), "int8")})
    assert isinstance(laid["a"], HopperWeight) and isinstance(laid["c"], QuantizedWeight) and laid["a"].shape == w.shape
    jax.tree.map(np.testing.assert_array_equal, laid["a"].by_rows(), w)
    np.testing.assert_array_equal(laid["a"].materialize(), w.materialize())
    w, laid, x, y = *jax.tree.map(lambda leaf: leaf[1], (w, laid["a"])), jnp.ones((3, 128)), jnp.ones((3, 64))
    np.testing.assert_array_equal(weights.dot(x, laid), weights.dot(x, w))
    np.testing.assert_array_equal(weights.dot_transposed(y, laid), weights.dot_transposed(y, w))
    np.testing.assert_array_equal(weights.embed(jnp.arange(5), laid), weights.embed(jnp.arange(5), w))


def test_only_a_single_hopper_gpu_has_its_own_layout(monkeypatch):
    w = quantize(jnp.ones((64, 64)), "nf4", group=64)
    mesh = lambda platform, size=1: SimpleNamespace(size=size, devices=np.array([SimpleNamespace(platform=platform)] * size))  # noqa: E731
    assert for_device(w, mesh("gpu")) is w  # this machine has none
    monkeypatch.setattr(hopper, "unfit_device", lambda: None)
    assert isinstance(for_device(w, mesh("gpu")), HopperWeight)
    assert for_device(w, mesh("cpu")) is w and for_device(w, mesh("gpu", size=2)) is w
    for implementation, laid in (("gpu", HopperWeight), ("reference", QuantizedWeight)):
        found = for_device(dataclasses.replace(w, implementation=implementation), mesh("gpu"))
        assert isinstance(found, laid) and found.implementation == implementation


def test_nested_scales_stay_nested():
    w = jax.eval_shape(lambda w: quantize(w, "nf4", nested=True), jax.ShapeDtypeStruct((2, 128, 64), jnp.bfloat16))
    laid = jax.eval_shape(for_hopper, w)
    assert laid.scales == w.scales and laid.codes.shape == (2, 64, 16)


def spread(layout, columns=64):
    """The numbers from 0 on of a fragment as a layout deals them out: registers, warp, lane and vector on axes of their own."""
    found = np.arange(64 * columns).reshape(64, columns)
    for tile in layout.tiling.tiles:
        lead, sizes = found.shape[: -len(tile)], found.shape[-len(tile) :]
        found = found.reshape(*lead, *(n for size, t in zip(sizes, tile, strict=True) for n in (size // t, t)))
        k = len(lead)
        found = found.transpose(*range(k), *range(k, k + 2 * len(tile), 2), *range(k + 1, k + 2 * len(tile), 2))
    return found


def test_a_threads_word_holds_the_codes_of_the_numbers_that_it_must_hold():
    """Every position of a fragment is written as three codes of 4 bits, laid out, and read where each thread reads."""
    digits = [np.arange(4096).reshape(64, 64) >> shift & 15 for shift in (0, 4, 8)]
    laid = [decode.by_outputs(Packed(decode.pack(jnp.asarray(digit.T, jnp.uint8)), jnp.zeros(()))).codes for digit in digits]
    codes = [np.asarray(words)[..., None] >> np.arange(0, 32, 4) & 15 for words in laid]
    stored = sum(digit << shift for digit, shift in zip(codes, (0, 4, 8), strict=True))
    words = stored.reshape(-1, 8)[spread(mgpu.WGMMA_LAYOUT, columns=8)]
    sixteen = words.reshape(*words.shape[:-2], 16)
    for block, wanted in enumerate(spread(mgpu.WGMMA_LAYOUT)[0]):  # as hopper_registers.numbers hands them out
        np.testing.assert_array_equal(wanted, sixteen[0, 0, ..., 2 * block : 2 * block + 2])


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_at_every_place_becomes_its_number(signed):
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    for at in range(8):
        place = hopper_registers.places(signed)[at % 4]
        part = (words >> np.uint32(16 * (at // 4)) & np.uint32(place.mask)) ^ np.uint32(place.flip)
        numbers = part.view(np.float32) * np.float32(place.factor) + np.float32(place.offset)
        book = hopper_registers.SIGNED if signed else hopper_registers.UNSIGNED
        np.testing.assert_array_equal(numbers, np.asarray(book)[words >> np.uint32(4 * at) & 15])


def test_a_shuffle_fetches_from_the_lane_that_holds_the_codes_number():
    """The rule of `shfl.sync.idx` in the PTX manual; lane l holds number l mod 16."""
    clamp, segments = hopper_registers.HALVES & 31, hopper_registers.HALVES >> 8 & 31
    for lane in range(32):
        for word in range(64):
            source = (lane & segments) | (word & 31 & ~segments)
            assert source % 16 == word % 16 and source <= ((lane & segments) | (clamp & ~segments))


@interpreted
def test_decoded_tiles_are_those_of_the_reference_bit_by_bit(key):
    """The unit matrix times D, in several blocks of rows and columns and steps."""
    w, spec, dense = matrix(key, "nf4", 128, 256, 32)
    found = hopper.product(spec, jnp.eye(128, dtype=jnp.bfloat16), w, tile=Tile(64, 2, 64), interpret=interpreter())
    np.testing.assert_array_equal(np.asarray(found, np.float64), dense)


@interpreted
def test_splits_of_ragged_rows_add_up_to_the_product(key):
    w, spec, dense = matrix(key, "uint4", 256, 128, 64)
    x = jax.random.normal(key, (19, 256), jnp.bfloat16)
    found = hopper.product(spec, x, w, tile=Tile(16, 1, 64, splits=2), interpret=interpreter())
    assert found.shape == (19, 128) and relative(found, np.asarray(x, np.float64) @ dense) < 1e-2


@interpreted
def test_the_transposed_product_comes_from_the_same_codes(key):
    w, spec, dense = matrix(key, "int4", 256, 128, 128)
    y = jax.random.normal(key, (100, 128), jnp.bfloat16)
    found = hopper.product_transposed(spec, y, w, tile=Tile(64, 2, 64), interpret=interpreter())
    assert found.shape == (100, 256) and relative(found, np.asarray(y, np.float64) @ dense.T) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_on_a_gpu_products_are_those_of_the_matrix(format, group, key):
    w, spec, dense = matrix(key, format, 1024, 768, group)
    unit = jnp.eye(1024, dtype=jnp.bfloat16)
    product = jax.jit(lambda x: int4_matmul.product(x, w, spec, implementation="gpu"))
    np.testing.assert_array_equal(np.asarray(product(unit), np.float64), dense)
    transposed = jax.jit(lambda y: int4_matmul.product_transposed(y, w, spec, implementation="gpu"))
    np.testing.assert_array_equal(np.asarray(transposed(jnp.eye(768, dtype=jnp.bfloat16)), np.float64), dense.T)
    for m in (1, 8, 16, 100, 256, 2048):
        x, y = jax.random.normal(key, (m, 1024), jnp.bfloat16), jax.random.normal(key, (m, 768), jnp.bfloat16)
        assert relative(product(x), np.asarray(x, np.float64) @ dense) < 1e-2
        assert relative(transposed(y), np.asarray(y, np.float64) @ dense.T) < 1e-2
