import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from ftjax import models, peft, tree, weights
from ftjax.models import layers, rope
from ftjax.peft.bottleneck import Bottleneck, Serial
from tests.peft import formula

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
MLP_AND_ATTENTION = ("down_proj", "o_proj")


def fields(key, d, m, biases=True):
    shapes = {"down": (d, m), "up": (m, d)} | ({"down_bias": (m,), "up_bias": (d,)} if biases else {})
    return {name: formula.normal(jax.random.fold_in(key, n), *shape) for n, (name, shape) in enumerate(shapes.items())}


def after(x, activation, scale, down, up, down_bias=0.0, up_bias=0.0):
    """The formula, of float64 arrays."""
    return scale * (ACTIVATIONS[activation](x @ down + down_bias) @ up + up_bias)


def of_preset(name, key):
    model = models.build(models.preset(name))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, key)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape) + 0.3 * (x.ndim < 3), x.dtype), shapes)
    return model, params, jax.random.randint(key, (2, 12), 0, 260)


def moved(trainable):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape), x.dtype), trainable)


def hidden(model, params, tokens):
    return jax.jit(lambda params, tokens: model.apply(params, tokens)[0])(params, tokens)


def test_every_product_of_a_linear_one_equals_that_of_its_merged_matrix(key):
    def leaf(base, **arrays):
        return Serial(base, Bottleneck(**arrays, scale=0.5))

    formula.check(leaf, lambda base, down, up: base + 0.5 * base @ down @ up, fields(key, 5, 2, biases=False), i=6, o=5, key=key)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_equal_the_formula(activation, key):
    arrays = fields(key, 5, 3)
    base, inputs, y = (formula.normal(jax.random.fold_in(key, n), *shape) for n, shape in ((7, (6, 5)), (8, (2, 4, 6)), (9, (2, 4, 5))))

    def want(arrays, x=None):
        h = (formula.double(inputs) if x is None else x) @ formula.double(base)
        return h + after(h, activation, 0.7, **arrays)

    def leaf(arrays):
        return Serial(base, Bottleneck(**arrays, scale=0.7, activation=activation))

    def got(arrays):
        return weights.dot(inputs, leaf(arrays))

    formula.close(got(arrays), want(formula.double(arrays)))
    gradient = jax.grad(lambda arrays: jnp.sum(y * got(arrays)))(arrays)
    way = formula.double(fields(jax.random.key(1), 5, 3))
    ahead, behind = ({n: a + step * way[n] for n, a in formula.double(arrays).items()} for step in (1e-5, -1e-5))
    slope = np.sum(formula.double(y) * (want(ahead) - want(behind))) / 2e-5
    np.testing.assert_allclose(sum(np.vdot(gradient[n], way[n]) for n in arrays), slope, rtol=2e-4, atol=1e-3)
    formula.close(weights.embed(jnp.array([3, 0]), leaf(arrays)), want(formula.double(arrays), np.eye(6)[[3, 0]]))


@settings(max_examples=6, deadline=None)
@given(d=st.integers(1, 9), m=st.integers(1, 5), lead=st.lists(st.integers(1, 3), max_size=2), wide=st.booleans(), biases=st.booleans())
def test_any_shape_and_dtype_of_input_keeps_both(d, m, lead, wide, biases):
    key = jax.random.key(d + 10 * m)
    arrays, x = fields(key, d, m, biases), jax.random.normal(key, (*lead, d), jnp.float32 if wide else jnp.bfloat16)
    got = weights.dot(x, Bottleneck(**arrays, scale=2.0, activation="tanh"))
    assert got.dtype == x.dtype and got.shape == x.shape
    want = after(formula.double(x), "tanh", 2.0, **formula.double(arrays))
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-4 if wide else 1e-2, atol=1e-3 if wide else 0.1)


def test_beside_mlp_and_attention_runs_the_formula_on_what_they_read(key):
    config = models.preset("tiny-llama")
    d, x = config.hidden_size, 0.5 * formula.normal(key, 2, 7, config.hidden_size)
    net = Bottleneck(**fields(key, d, 4), scale=4.0, activation="relu")
    positions = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    turns = rope.table(config.rope, config.head_dim, positions)
    scene = layers.Scene(*turns, positions, jnp.ones((2, 7), jnp.int32), None, "auto", jnp.zeros((), jnp.int32), None, positions,
                         jnp.ones((2, 7), jnp.int32))  # fmt: skip
    beside = scene._replace(slots={"mlp": {"one": net}, "self_attn": {"one": net}})
    mlp, attention = layers.MLP(config, rngs=nnx.Rngs(0)), layers.Attention(config, rngs=nnx.Rngs(1))
    arrays = {name: formula.double(getattr(net, name)) for name in ("down", "up", "down_bias", "up_bias")}
    want = after(formula.double(x), "relu", 4.0, **arrays)
    formula.close(mlp(x, beside) - mlp(x, scene), want)
    formula.close(attention(x, beside, None)[0] - attention(x, scene, None)[0], want)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_decoding_with_a_cache_equals_the_full_forward(name, key):
    model, params, tokens = of_preset(name, key)
    method = peft.chain(peft.bottleneck(width=3), peft.parallel_bottleneck(MLP_AND_ATTENTION, width=3))
    frozen, trainable = method.init(key, params)
    attached = method.attach(frozen, moved(trainable))
    cache, outs = models.init_cache(model.config, 2, 12), []
    step = jax.jit(lambda params, tokens, cache: model.apply(params, tokens, cache=cache))
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        out, cache = step(attached, tokens[:, start:stop], cache)
        outs.append(out)
    whole = hidden(model, attached, tokens)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, rtol=0, atol=1e-5)
    assert jnp.max(jnp.abs(whole - hidden(model, params, tokens))) > 0.01


@pytest.mark.parametrize("make", [peft.bottleneck, peft.parallel_bottleneck])
def test_some_layers_alone_are_adapted(make, key):
    _, params, _ = of_preset("tiny-llama", key)
    method = make(width=2, layers="last 1")
    frozen, trainable = method.init(key, params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trainable)} == {1}
    (net, *_) = [leaf for leaf in tree.flatten(method.attach(frozen, moved(trainable))).values() if isinstance(leaf, weights.Weight)]
    net = net.net if isinstance(net, Serial) else net
    assert all(not jnp.any(x[:-1]) and jnp.any(x[-1]) for x in (net.up, net.up_bias))


def test_it_trains_what_the_papers_count(key):
    params = jax.eval_shape(models.build(models.preset("llama-3-8b")).init, key)
    d, m, count = 4096, 256, 32
    one = 2 * d * m + m + d
    assert tree.size(jax.eval_shape(peft.bottleneck().init, key, params)[1]) == 2 * count * one  # Houlsby
    assert tree.size(jax.eval_shape(peft.bottleneck(["down_proj"]).init, key, params)[1]) == count * one  # Pfeiffer
    assert tree.size(jax.eval_shape(peft.parallel_bottleneck(width=m).init, key, params)[1]) == count * one
    assert tree.size(jax.eval_shape(peft.bottleneck(activation="identity").init, key, params)[1]) == 2 * count * 2 * d * m


@pytest.mark.parametrize("make", [peft.bottleneck, peft.parallel_bottleneck])
def test_what_is_not_linear_is_not_merged(make, key):
    _, params, _ = of_preset("tiny-llama", key)
    with pytest.raises(ValueError, match="cannot be merged into one: keep the adapter beside its model"):
        peft.merge(make(), *make().init(key, params))


BAD = {
    "0 does not fit": lambda: peft.bottleneck(width=0),
    "33 does not fit": lambda: peft.bottleneck(width=33),
    "a number from 1": lambda: peft.bottleneck(reduction=0),
    "no activation 'rely'; nearest: 'relu'": lambda: peft.parallel_bottleneck(activation="rely"),
    "is not the output projection": lambda: peft.parallel_bottleneck(["q_proj"]),
    "is not a matrix": lambda: peft.bottleneck("norms"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_say_what_was_expected(message, key):
    params = jax.eval_shape(models.build(models.preset("tiny-llama")).init, key)
    assert params["norm"]["scale"].shape == (32,)
    with pytest.raises(ValueError, match=message):
        BAD[message]().init(key, params)
