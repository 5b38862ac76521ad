"""Eight devices multiply by their parts of a packed matrix as one multiplies by all of it, forwards and backwards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import sharding, weights
from ftjax.kernels import int4_matmul
from ftjax.kernels.int4_matmul import Implementation, implementations, tpu
from ftjax.quant import quantize

CASES = {  # how [192, 64] is split, its groups, whether in the TPU kernel, and the rows, columns and groups of a device
    "by columns, in the TPU kernel": ((None, "tensor"), 64, True, (192, 32, 3)),
    "by rows, in the TPU kernel": (("tensor", None), 32, True, (96, 64, 3)),
    "by rows": (("tensor", None), 32, False, (96, 64, 3)),
    "by rows, of three groups": (("tensor", None), 64, False, (192, 64, 3)),
    "by rows, all of one group": (("tensor", None), None, False, (96, 64, 1)),
    "rows of x alone": ((None, None), 64, False, (192, 64, 3)),
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(("dense", "group", "kernel", "expected_part"), CASES.values(), ids=CASES)
def test_eight_devices_equal_one_and_groups_stay_together(dense, group, kernel, expected_part, mesh, key, monkeypatch):
    w = jax.jit(partial(quantize, format="uint4", group=group))(jax.random.normal(key, (192, 64)))
    x, y = (jax.random.normal(jax.random.fold_in(key, n), (8, 3, size)) for n, size in enumerate((192, 64)))
    there = w.on_mesh(mesh, sharding.ROWS, dense)

    def both(x, y, w):
        out, pullback = jax.vjp(lambda x: weights.dot(x, w), x)
        return out, pullback(y)[0]

    expected = jax.jit(both)(x, y, w)
    if kernel:
        forms = (partial(form, interpret=True) for form in (tpu.product, tpu.product_transposed))
        monkeypatch.setattr(implementations, "IMPLEMENTATIONS", {"interpreted": Implementation(*forms, tpu.unfit)})
    found = jax.jit(both)(x, y, there)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4)
    shapes = int4_matmul.part(there.place, there._spec, there._packed())
    assert (2 * shapes.codes.shape[0], shapes.codes.shape[1], shapes.scales.shape[0]) == expected_part


def test_the_choice_is_that_of_a_device_s_part(mesh):
    w = jax.eval_shape(lambda w: quantize(w, group=None), jax.ShapeDtypeStruct((96, 128), jnp.bfloat16))
    assert w.choice(8, jnp.bfloat16, "tpu").name == "tpu"
    assert "not of 48" in w.on_mesh(mesh, sharding.ROWS, ("tensor", None)).choice(8, jnp.bfloat16, "tpu").passed["tpu"]
