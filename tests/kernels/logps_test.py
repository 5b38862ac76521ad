from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.kernels import logps
from ftjax.peft.lora import LoraWeight
from ftjax.weights import dot

OUTPUTS = ("logps", "mean_logps", "entropy", "greedy", "log_collision")
B, T, D, V = 3, 11, 8, 23


def unembed(head, hidden):
    return 4 * jnp.tanh(dot(hidden, head["kernel"]).astype(jnp.float32) / 4)  # a soft-capped head


@pytest.fixture
def problem(key):
    keys = jax.random.split(key, 5)
    mask = (jax.random.uniform(keys[3], (B, T)) > 0.5).astype(jnp.float32).at[1].set(0.0)  # one row counts nothing
    return {
        "head": {"kernel": jax.random.normal(keys[0], (D, V))},
        "hidden": jax.random.normal(keys[1], (B, T, D)),
        "targets": jax.random.randint(keys[2], (B, T), 0, V),
        "mask": mask,
    }, jax.random.normal(keys[4], (B, T))


def weighted(function, cotangent, head, hidden, targets, mask, entropy=0.0):
    found = function(unembed, head, hidden, targets, mask)
    return jnp.sum(cotangent * found["logps"] + cotangent**2 * found["mean_logps"] + entropy * cotangent**3 * found["entropy"]), found


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("argnums", [(1,), (2,), (1, 2)], ids=["head", "hidden", "both"])
def test_chunks_equal_the_whole_in_value_and_gradient(problem, chunk, argnums):
    arrays, cotangent = problem
    chunked = partial(logps.token_logps, chunk=chunk, outputs=OUTPUTS)
    got = jax.jit(jax.value_and_grad(partial(weighted, chunked), argnums, has_aux=True))(cotangent, *arrays.values())
    expected = jax.value_and_grad(partial(weighted, logps.reference), argnums, has_aux=True)(cotangent, *arrays.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), got, expected)


@pytest.mark.parametrize("argnums", [(1,), (2,)], ids=["head", "hidden"])
def test_the_entropy_has_a_gradient_where_it_is_asked_for(problem, argnums):
    arrays, cotangent = problem
    loss = partial(weighted, entropy=1.0)
    chunked = partial(logps.token_logps, chunk=4, outputs=OUTPUTS)
    of = lambda function, loss: jax.jit(jax.grad(partial(loss, function), argnums, has_aux=True))(cotangent, *arrays.values())[0]  # noqa: E731
    got, expected = of(partial(chunked, differentiable=(*logps.DIFFERENTIABLE, "entropy")), loss), of(logps.reference, loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6), got, expected)
    jax.tree.map(np.testing.assert_array_equal, of(chunked, loss), of(chunked, weighted))


def test_values_equal_numpy_in_float64(problem):
    arrays, _ = problem
    hidden, kernel = (np.asarray(x, np.float64) for x in (arrays["hidden"], arrays["head"]["kernel"]))
    logits = 4 * np.tanh(hidden @ kernel / 4)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows, columns = np.indices((B, T))
    mask = np.asarray(arrays["mask"])
    found = logps.token_logps(unembed, **arrays, chunk=4, outputs=OUTPUTS)
    np.testing.assert_allclose(found["logps"], np.log(p)[rows, columns, np.asarray(arrays["targets"])] * mask, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(-1) * mask, rtol=1e-5)
    np.testing.assert_allclose(found["mean_logps"], np.log(p).mean(-1) * mask, rtol=1e-5)
    np.testing.assert_array_equal(found["greedy"], (p.argmax(-1) == np.asarray(arrays["targets"])) * mask)


def test_a_token_outside_the_mask_may_hold_anything(problem):
    arrays, cotangent = problem
    spoilt = arrays | {"hidden": jnp.where(arrays["mask"][..., None] > 0, arrays["hidden"], jnp.nan)}
    chunked = partial(logps.token_logps, chunk=4, outputs=OUTPUTS)
    for argnums in (1, 2):
        loss = jax.grad(partial(weighted, chunked), argnums, has_aux=True)
        got, expected = loss(cotangent, *spoilt.values())[0], loss(cotangent, *arrays.values())[0]
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_gradients_reach_the_factors_of_an_adapter_on_the_head(problem):
    arrays, cotangent = problem
    kernel = arrays["head"]["kernel"]

    def loss(function, factors):
        head = {"kernel": LoraWeight(kernel, factors["a"], factors["b"], jnp.ones(()))}
        return weighted(function, cotangent, head, arrays["hidden"], arrays["targets"], arrays["mask"])[0]

    factors = {"a": jnp.full((D, 2), 0.1), "b": jnp.full((2, V), 0.2)}
    got = jax.grad(partial(loss, partial(logps.token_logps, chunk=4, outputs=OUTPUTS)))(factors)
    expected = jax.grad(partial(loss, logps.reference))(factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("argnums", [1, 2], ids=["head", "hidden"])
def test_the_logits_are_never_held(argnums):
    time, vocabulary, dim = 512, 4096, 16
    shapes = (
        jax.ShapeDtypeStruct((2, time), jnp.float32),
        {"kernel": jax.ShapeDtypeStruct((dim, vocabulary), jnp.float32)},
        jax.ShapeDtypeStruct((2, time, dim), jnp.float32),
        jax.ShapeDtypeStruct((2, time), jnp.int32),
        jax.ShapeDtypeStruct((2, time), jnp.float32),
    )
    logits_bytes = 2 * time * vocabulary * 4

    def temporaries(function):
        step = jax.jit(jax.grad(partial(weighted, function), argnums, has_aux=True))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(partial(logps.token_logps, chunk=8, outputs=OUTPUTS)) < logits_bytes / 8
    assert temporaries(logps.reference) > logits_bytes  # so that the bound above means something


def test_chunks_without_a_counted_token_are_not_visited(problem):
    arrays, _ = problem
    visits = []

    def spy(head, hidden):
        jax.debug.callback(lambda: visits.append(1))
        return unembed(head, hidden)

    mask = jnp.zeros((B, T)).at[:, -3:].set(1.0)
    jax.block_until_ready(logps.token_logps(spy, **(arrays | {"mask": mask}), chunk=2))
    jax.effects_barrier()
    assert len(visits) == 2  # three tokens a row in chunks of two


def test_an_unknown_output_is_named(problem):
    with pytest.raises(ValueError, match="perplexity"):
        logps.token_logps(unembed, **problem[0], chunk=4, outputs=("perplexity",))
