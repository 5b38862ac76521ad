"""Where an adapter starts: the papers' factors in float64, the base's function to rounding, and gradients as if the base had moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree, weights
from ftjax.peft import inits
from ftjax.peft.lora import LoraWeight, relative

LAYERS, IN, OUT, R, ALPHA = 3, 12, 8, 4, 6.0
Q = "layers/self_attn/q_proj/kernel"
RELATIVE = ["pissa", "pissa_niter_7", "olora", "corda", "lora_ga"]
INPUTS, GRADIENTS = (np.random.default_rng(n).standard_normal((LAYERS, *size), np.float32) for n, size in enumerate([(40, IN), (IN, OUT)]))
CALIBRATED = {"corda": inits.corda({Q: INPUTS.mT @ INPUTS}), "lora_ga": inits.lora_ga({Q: GRADIENTS})}


@pytest.fixture
def params(key):
    return tree.unflatten({Q: jax.random.normal(key, (LAYERS, IN, OUT))})


def lora(init, **options):
    return peft.lora(["q_proj"], rank=R, alpha=ALPHA, init=CALIBRATED.get(init, init), **options)


def factors(trainable):
    return (np.asarray(tree.flatten(trainable)[f"lora/{Q}/{side}"], np.float64) for side in "ab")


def test_pissa_is_the_principal_part_of_each_layer(params, key):
    a, b = factors(lora("pissa").init(key, params)[1])
    u, s, vt = np.linalg.svd(np.asarray(tree.flatten(params)[Q], np.float64), full_matrices=False)
    principal = np.einsum("lir,lr,lro->lio", u[..., :R], s[..., :R], vt[:, :R])
    np.testing.assert_allclose(ALPHA / R * a @ b, principal, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2), rtol=1e-4)  # the root on both sides


def test_the_randomised_decomposition_finds_the_exact_one(key):
    u, vt = (jnp.linalg.qr(jax.random.normal(k, (2, 40, 40)))[0] for k in jax.random.split(key))
    weight = u * (0.7 ** jnp.arange(40.0))[None, None, :] @ vt
    exact, fast = (make.factors(key, weight, 5) for make in (inits.pissa(), inits.pissa(4)))
    np.testing.assert_allclose(fast[0] @ fast[1], exact[0] @ exact[1], atol=2e-4)


@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_the_randomised_decomposition_takes_any_number_of_iterations(iterations, params, key):
    named, made = (factors(lora(init).init(key, params)[1]) for init in (f"pissa_niter_{iterations}", inits.pissa(iterations)))
    assert all(np.array_equal(x, y) for x, y in zip(named, made, strict=True))


def test_olora_is_an_orthonormal_basis_of_the_outputs(params, key):
    a, b = factors(lora("olora").init(key, params)[1])
    root = np.sqrt(ALPHA / R)
    np.testing.assert_allclose(root**2 * b @ np.swapaxes(b, 1, 2), np.broadcast_to(np.eye(R), (LAYERS, R, R)), atol=1e-5)
    weight = np.asarray(tree.flatten(params)[Q], np.float64)
    np.testing.assert_allclose(root * a, weight @ (root * np.swapaxes(b, 1, 2)), atol=1e-5)  # A = W Bᵀ: the first r columns of Rᵀ


@pytest.mark.parametrize("init", [*RELATIVE, "orthogonal"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_function_is_unchanged_to_rounding_and_both_factors_can_learn(init, dtype, params, key):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    frozen, trainable = lora(init).init(key, params)
    base, attached = tree.flatten(params)[Q], tree.flatten(lora(init).attach(frozen, trainable))[Q]
    x = jax.random.normal(key, (5, IN)).astype(dtype)
    bound = 2e-6 if dtype == jnp.float32 else 1e-2
    one = jax.tree.map(lambda leaf: leaf[1], attached)
    np.testing.assert_allclose(np.float32(weights.dot(x, one)), np.float32(x @ base[1]), atol=bound * 10)
    np.testing.assert_allclose(np.float32(weights.materialize(attached)), np.float32(base), atol=bound * 4)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(trainable))
    assert frozen["layers"]["self_attn"]["q_proj"]["kernel"] is base


@pytest.mark.parametrize("init", RELATIVE)
def test_value_and_gradient_are_those_of_a_base_that_moved(init, params, key):
    method = lora(init)
    frozen, start = method.init(key, params)
    x, target = jax.random.normal(key, (5, IN)), jax.random.normal(key, (5, OUT))
    now = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), start)

    def ours(trainable):
        weight = jax.tree.map(lambda leaf: leaf[2], tree.flatten(method.attach(frozen, trainable))[Q])
        return jnp.sum((weights.dot(x, weight) - target) ** 2)

    def moved(trainable):
        (a, b), (a0, b0) = ([tree.flatten(t)[f"lora/{Q}/{side}"][2] for side in "ab"] for t in (trainable, start))
        scale = ALPHA / R
        base = tree.flatten(params)[Q][2] - scale * a0 @ b0
        return jnp.sum((x @ base + scale * (x @ a) @ b - target) ** 2)

    (value, grads), (expected, expected_grads) = (jax.value_and_grad(f)(now) for f in (ours, moved))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4), grads, expected_grads)


@pytest.mark.parametrize("init", [*RELATIVE, "uniform"])
def test_the_adapter_is_a_plain_lora_on_the_published_weights(init, params, key):
    method = lora(init)
    frozen, start = method.init(key, params)
    now = jax.tree.map(lambda leaf: leaf + 0.1, start)
    a, b = (tree.flatten(relative(frozen, now))[f"lora/{Q}/{side}"] for side in "ab")
    assert a.shape[-1] == b.shape[-2] == (R if init == "uniform" else 2 * R)
    plain = LoraWeight(tree.flatten(params)[Q], a, b, jnp.full((LAYERS,), ALPHA / R))
    np.testing.assert_array_equal(weights.materialize(plain), weights.materialize(tree.flatten(method.attach(frozen, now))[Q]))


def test_the_start_does_not_share_a_buffer_with_what_a_step_donates(params, key):
    frozen, trainable = lora("pissa").init(key, params)
    assert not {id(x) for x in jax.tree.leaves(frozen["lora"])} & {id(x) for x in jax.tree.leaves(trainable)}


WRONG = {
    "unknown": (lambda: lora("pisa"), "nearest: 'pissa'"),
    "no number": (lambda: lora("pissa_niter_many"), "nearest: 'pissa_niter_4'"),
    "gamma": (lambda: inits.lora_ga({}, gamma=0.0), "above 0, not 0.0"),
    "rho": (lambda: inits.eva({}, rho=0.5), "at least 1, not 0.5"),
    "odd": (
        lambda: peft.lora(["q_proj"], rank=3, init="orthogonal").init(jax.random.key(0), {"q_proj": {"kernel": jnp.ones((4, 4))}}),
        "even rank",
    ),
    "elsewhere": (lambda: peft.dora(["q_proj"], rank=2, init="pissa"), "only `lora` can"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_init_that_cannot_be_meant_says_why(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()
