"""DoRA: its formula in NumPy float64, a norm that is constant to the gradient, dropout as in PEFT, and one dense matrix at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree, weights
from ftjax.peft.dora import DoraWeight, column_norms
from ftjax.peft.lora import LoraWeight
from tests.peft import formula

IN, OUT, R, LAYERS = 6, 5, 3, 2
Q = "layers/self_attn/q_proj/kernel"


@pytest.fixture
def params(key):
    return {"layers": {"self_attn": {"q_proj": {"kernel": jax.random.normal(key, (LAYERS, IN, OUT))}}}}


def test_every_product_and_its_gradient_equal_the_formula(key):
    keys = jax.random.split(key, 4)
    arrays = {"a": formula.normal(keys[0], IN, R), "b": formula.normal(keys[1], R, OUT), "scale": jnp.asarray(0.7)}
    arrays["ratio"] = formula.normal(keys[2], OUT)
    formula.check(DoraWeight, lambda base, a, b, scale, ratio: (base + scale * a @ b) * ratio[None], arrays, i=IN, o=OUT, key=keys[3])


def trained(method, params, key):
    frozen, trainable = method.init(key, params)
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(key, len(leaves))
    return frozen, jax.tree.unflatten(structure, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_columns_have_the_trained_length_and_the_direction_of_lora(params, key):
    frozen, trainable = trained(peft.dora(["q_proj"], rank=R, alpha=6), params, key)
    got = np.asarray(tree.flatten(peft.merge(peft.dora(["q_proj"], rank=R, alpha=6), frozen, trainable))[Q], np.float64)
    w, a, b, m = (
        np.asarray(x, np.float64)
        for x in (tree.flatten(params)[Q], *(tree.flatten(trainable)[f"dora/{Q}/{f}"] for f in ("a", "b", "magnitude")))
    )
    direction = w + 2.0 * a @ b
    want = m[:, None] * direction / np.sqrt((direction**2).sum(1, keepdims=True))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sqrt((got**2).sum(1)), np.abs(m), rtol=1e-5)


def test_the_norm_is_a_constant_to_the_gradient(params, key):
    """Central differences of m ⊙ (W + s A B) / n with n held where it was, in float64."""
    method = peft.dora(["q_proj"], rank=R)
    frozen, trainable = trained(method, params, key)
    x, y = jax.random.normal(key, (4, IN)), jax.random.normal(key, (4, OUT))

    def loss(trainable):
        leaf = tree.flatten(method.attach(frozen, trainable))[Q]
        return sum(jnp.vdot(y, weights.dot(x, jax.tree.map(lambda v, n=n: v[n], leaf))) for n in range(LAYERS))

    start = {path: np.asarray(value, np.float64) for path, value in tree.flatten(trainable).items()}
    w = np.asarray(tree.flatten(params)[Q], np.float64)
    direction = lambda at: w + at[f"dora/{Q}/a"] @ at[f"dora/{Q}/b"]  # noqa: E731
    fixed = np.sqrt((direction(start) ** 2).sum(1))

    def formula_at(path, step):
        at = {**start, path: start[path] + step}
        dense = direction(at) * (at[f"dora/{Q}/magnitude"] / fixed)[:, None]
        return np.sum(np.asarray(y, np.float64)[None] * (np.asarray(x, np.float64)[None] @ dense))

    for path, gradient in tree.flatten(jax.grad(loss)(trainable)).items():
        way = np.random.default_rng(0).standard_normal(gradient.shape)
        slope = (formula_at(path, 1e-5 * way) - formula_at(path, -1e-5 * way)) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * way), slope, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("members", ["DD", "DAL", "AD", "LDD"])
def test_fused_products_equal_separate_ones(key, members):
    x, ws = jax.random.normal(key, (2, 4, IN)), []
    for n, (kind, k) in enumerate(zip(members, jax.random.split(key, len(members)), strict=True)):
        base = jax.random.normal(k, (IN, OUT + n))
        factors = (jax.random.normal(k, (IN, n + 1)), jax.random.normal(k, (n + 1, OUT + n)), jnp.asarray(0.7))
        leaves = {"A": base, "L": LoraWeight(base, *factors)} if kind != "D" else {}
        ws.append(leaves.get(kind, DoraWeight(base, *factors, jnp.linspace(0.5, 2, OUT + n))))
    for got, w in zip(weights.dots(x, ws), ws, strict=True):
        np.testing.assert_allclose(got, x @ weights.materialize(w), rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_all_that_differs_from_the_base(params, key):
    """y = x W + (m/n - 1) · d W + m/n · s · d A B, with d the dropped x: what PEFT computes."""
    method = peft.dora(["q_proj"], rank=R, dropout=0.5)
    frozen, trainable = trained(method, params, key)
    leaf = jax.tree.map(lambda v: v[0], tree.flatten(method.attach(frozen, trainable, key=key))[Q])
    x = jnp.ones((7, IN))
    d = jnp.where(jax.random.bernoulli(leaf.key, 0.5, x.shape), 2.0, 0.0)
    want = x @ leaf.base + (leaf.ratio - 1)[None] * (d @ leaf.base) + leaf.ratio[None] * (d @ leaf.a @ leaf.b)
    np.testing.assert_allclose(weights.dot(x, leaf), want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(want, x @ weights.materialize(leaf), atol=1e-2)


def test_inside_jit_the_start_is_the_identity_to_a_rounding(params, key):
    method = peft.dora(["q_proj"], rank=R)
    frozen, trainable = method.init(key, params)
    ratio = jax.jit(lambda f, t: tree.flatten(method.attach(f, t))[Q].ratio)(frozen, trainable)
    np.testing.assert_allclose(ratio, np.ones((LAYERS, OUT)), rtol=3e-7)


def test_a_column_of_zeros_stays_one(params, key):
    params = jax.tree.map(lambda x: x.at[:, :, 1].set(0), params)
    method = peft.dora(["q_proj"], rank=R)
    frozen, trainable = method.init(key, params)
    merged = tree.flatten(peft.merge(method, frozen, trainable))[Q]
    np.testing.assert_array_equal(merged, tree.flatten(params)[Q])


def test_layers_that_are_left_alone_stay_as_they_are(params, key):
    method = peft.on_layers(peft.dora(["q_proj"], rank=R), [1])
    frozen, trainable = trained(method, params, key)
    merged, base = tree.flatten(peft.merge(method, frozen, trainable))[Q], tree.flatten(params)[Q]
    np.testing.assert_array_equal(merged[0], base[0])
    assert not np.allclose(merged[1], base[1], atol=1e-2)


def test_the_start_multiplies_by_no_constant(key):
    """CPU fusions of JAX 0.12 read a constant factor before it is written: at times a length at the start was infinite."""
    matrix = {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 576, 192), jnp.bfloat16)}}
    program = jax.jit(peft.dora(["q_proj"], rank=R).init).lower(key, matrix).compile().as_text()
    products = [line.split(" dot(")[1] for line in program.splitlines() if " dot(" in line]
    assert products and not [line for line in products if "%broadcast" in line or "%constant" in line]


def test_norms_make_no_dense_stack(key):
    """One layer's matrix at a time: the temporary memory does not grow with the number of layers."""

    def temporary(layers):
        shapes = [(layers, 256, 512), (layers, 256, 4), (layers, 4, 512), (layers,)]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(column_norms).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(4) + 4 * 512 * 256
