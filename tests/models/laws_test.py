"""What every family obeys: cache, scan, remat, padding, packing and positions change nothing; every product goes through `weights`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, tree, weights
from ftjax.types import pytree, static

TINY = [name for name in models.PRESETS if name.startswith("tiny-")]
families = pytest.mark.parametrize("name", TINY)
both_kinds = pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])  # the two kinds of layer
CLOSE = {"rtol": 0, "atol": 1e-5}
T = 20  # longer than the tiny windows


def model_of(name, **options):
    """Return a model and weights wide enough for every option to matter."""
    model = models.build(models.preset(name), **options)
    random = np.random.default_rng(0)
    shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    centers = {path: 0.5 if path.endswith("scale") else 0.0 for path in shapes}
    return model, tree.unflatten({p: jnp.asarray(random.normal(centers[p], 0.15, x.shape), x.dtype) for p, x in shapes.items()})


def hidden(model, params, tokens, **options):
    return jax.jit(lambda params, tokens, options: model.apply(params, tokens, **options)[0])(params, tokens, options)


def tokens_of(key, t=T, rows=2):
    return jax.random.randint(key, (rows, t), 0, 260)


@families
def test_cached_decoding_equals_the_full_forward(name, key):
    model, params = model_of(name)
    tokens = tokens_of(key)
    cache = models.init_cache(model.config, 2, T + 3)
    step = jax.jit(lambda params, tokens, cache: model.apply(params, tokens, cache=cache))
    outs = []
    for start, stop in [(0, 12), *((i, i + 1) for i in range(12, T))]:
        out, cache = step(params, tokens[:, start:stop], cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), hidden(model, params, tokens), **CLOSE)
    assert int(cache.index) == T


@both_kinds
def test_left_padding_changes_nothing_even_when_decoding(name, key):
    model, params = model_of(name)
    tokens, pad = tokens_of(key), 3
    padded = jnp.pad(tokens, ((0, 0), (pad, 0)), constant_values=7)
    positions = jnp.maximum(jnp.arange(T + pad, dtype=jnp.int32)[None] - pad, 0) * jnp.ones((2, 1), jnp.int32)
    segments = jnp.broadcast_to((jnp.arange(T + pad)[None] >= pad).astype(jnp.int32), padded.shape)
    expected = hidden(model, params, tokens)
    np.testing.assert_allclose(hidden(model, params, padded, positions=positions, segment_ids=segments)[:, pad:], expected, **CLOSE)
    cache = models.init_cache(model.config, 2, T + pad)
    step = jax.jit(model.apply)
    _, cache = step(params, padded[:, :-1], positions=positions[:, :-1], segment_ids=segments[:, :-1], cache=cache)
    last, _ = step(params, padded[:, -1:], positions=positions[:, -1:], segment_ids=segments[:, -1:], cache=cache)
    np.testing.assert_allclose(last, expected[:, -1:], **CLOSE)


@both_kinds
def test_packing_and_shifting_positions_change_nothing(name, key):
    model, params = model_of(name)
    first, second = tokens_of(key, 9, 1), tokens_of(jax.random.fold_in(key, 1), 11, 1)
    packed = jnp.concatenate([first, second], axis=1)
    positions = jnp.concatenate([jnp.arange(9), 40 + jnp.arange(11)])[None]
    segments = jnp.concatenate([jnp.ones(9, jnp.int32), jnp.full(11, 2, jnp.int32)])[None]
    expected = jnp.concatenate([hidden(model, params, first), hidden(model, params, second)], axis=1)
    actual = hidden(model, params, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)  # rotary angles are larger at shifted positions
    assert np.abs(hidden(model, params, packed) - expected).max() > 0.01, "segments matter"


@both_kinds
def test_shifted_groups_see_less_and_neither_the_future_nor_other_documents(name, key):
    (model, params), (full, _) = model_of(name, group_tokens=4), model_of(name)
    tokens = tokens_of(key, rows=1)
    grouped = hidden(model, params, tokens)
    assert np.abs(grouped - hidden(full, params, tokens))[:, 4:].max() > 0.01
    np.testing.assert_allclose(hidden(model, params, tokens.at[:, 15:].add(1))[:, :15], grouped[:, :15], **CLOSE)
    positions = jnp.concatenate([jnp.arange(9), jnp.arange(11)])[None]
    segments = jnp.concatenate([jnp.ones(9, jnp.int32), jnp.full(11, 2, jnp.int32)])[None]
    alone = jnp.concatenate([hidden(model, params, tokens[:, :9]), hidden(model, params, tokens[:, 9:])], axis=1)
    np.testing.assert_allclose(hidden(model, params, tokens, positions=positions, segment_ids=segments), alone, **CLOSE)


@both_kinds
def test_groups_twice_as_long_as_the_row_are_none(name, key):
    (model, params), (full, _) = model_of(name, group_tokens=2 * T), model_of(name)
    np.testing.assert_allclose(hidden(model, params, tokens_of(key)), hidden(full, params, tokens_of(key)), **CLOSE)


@both_kinds
def test_scanned_equals_unrolled(name, key):
    tokens = tokens_of(key)
    (scanned, params), (unrolled, _) = model_of(name), model_of(name, scan=False)
    np.testing.assert_allclose(hidden(scanned, params, tokens), hidden(unrolled, params, tokens), **CLOSE)


def gradients(model, params, tokens, segments=None):
    def loss(params):
        out, _ = model.apply(params, tokens, segment_ids=segments)
        logits = model.unembed(model.head(params), out)
        return jnp.mean(jnp.square(logits if segments is None else logits * segments[:, :, None].astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", "elementwise"])
def test_remat_changes_neither_values_nor_gradients(remat, key):
    (plain, params), (remade, _) = model_of("tiny-gemma3"), model_of("tiny-gemma3", remat=remat)
    value, gradient = gradients(plain, params, tokens_of(key))
    other_value, other = gradients(remade, params, tokens_of(key))
    np.testing.assert_allclose(value, other_value, rtol=1e-5)
    for path, leaf in tree.flatten(gradient).items():
        np.testing.assert_allclose(tree.flatten(other)[path], leaf, atol=1e-4 * np.abs(leaf).max(), rtol=0, err_msg=path)


@families
def test_gradients_are_finite_with_padding_and_reach_every_leaf(name, key):
    model, params = model_of(name)
    segments = jnp.ones((2, T), jnp.int32).at[0, :6].set(0).at[1].set(0)
    value, gradient = gradients(model, params, tokens_of(key), segments)
    for path, leaf in tree.flatten(gradient).items():
        assert jnp.all(jnp.isfinite(leaf)), path
        moved = jnp.any(leaf != 0, axis=tuple(range(1, leaf.ndim)))
        assert jnp.all(moved) if path.startswith("layers/") else jnp.any(moved), path
    assert jnp.isfinite(value)


@pytree
class Scaled(weights.Weight):
    """`factor · array`, which no product may materialise: the dense array is not what a kernel must use."""

    array: jax.Array
    factor: jax.Array
    name: str = static()

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def materialize(self):
        raise AssertionError(f"{self.name} was materialised")

    def dot(self, x):
        return weights.dot(x * self.factor, self.array)

    def dot_transposed(self, x):
        return weights.dot_transposed(x * self.factor, self.array)

    def embed(self, ids):
        return weights.embed(ids, self.array) * self.factor


@both_kinds
def test_any_matrix_may_be_a_weight(name, key):
    model, params = model_of(name, remat="full")
    factors = {p: jnp.full(x.shape[:1] if p.startswith("layers/") else (), 1.2) for p, x in tree.flatten(params).items() if "kernel" in p}
    leaves = tree.flatten(params)
    scaled = tree.replace(params, {p: Scaled(leaves[p], f, p) for p, f in factors.items()})
    dense = tree.replace(params, {p: 1.2 * leaves[p] for p in factors})
    tokens = tokens_of(key)

    def logits(params):
        return jnp.mean(jnp.square(model.unembed(model.head(params), model.apply(params, tokens)[0])))

    actual, gradient = jax.jit(jax.value_and_grad(logits))(scaled)
    np.testing.assert_allclose(actual, jax.jit(logits)(dense), rtol=1e-4)
    for path in factors:
        assert jnp.all(tree.flatten(gradient)[path].factor != 0), path


@both_kinds
def test_activations_may_have_another_dtype_than_the_weights(name, key):
    (model, params), (other, _) = model_of(name), model_of(name, dtype="bfloat16")
    expected, actual = hidden(model, params, tokens_of(key)), hidden(other, params, tokens_of(key))
    assert actual.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
    assert other.unembed(other.head(params), actual).dtype == jnp.float32
    assert 0 < jnp.max(jnp.abs(actual.astype(jnp.float32) - expected)) < 0.3


def test_compile_time_does_not_grow_with_depth(key):
    def size(layers):
        model = models.build(models.config_from_hf({**models.PRESETS["tiny-gemma3"], "num_hidden_layers": layers}))
        shapes = jax.eval_shape(model.init, key)
        return len(jax.jit(model.apply).lower(shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32)).as_text().splitlines())

    assert size(12) == size(3)


def test_random_weights_are_as_wide_as_the_config_says_and_norms_begin_as_the_identity(key):
    model = models.build(models.preset("tiny-gemma3"))
    params = tree.flatten(model.init(key))
    for path in ("embed_tokens/kernel", "layers/mlp/up_proj/kernel"):
        np.testing.assert_allclose(np.std(params[path]), 0.02, rtol=0.05)
    assert not np.array_equal(*params["layers/mlp/up_proj/kernel"][:2]), "layers differ"
    np.testing.assert_array_equal(params["norm/scale"], 0.0)  # Gemma stores scale - 1
    llama = tree.flatten(models.build(models.preset("tiny-llama")).init(key))
    np.testing.assert_array_equal(llama["layers/input_layernorm/scale"], 1.0)


def test_an_unknown_option_names_the_nearest():
    config = models.preset("tiny-llama")
    with pytest.raises(ValueError, match="no remat 'ful'; nearest: 'full'"):
        models.build(config, remat="ful")
    with pytest.raises(ValueError, match="no attention 'block'; nearest: 'blocked"):
        models.build(config, attention="block")
    with pytest.raises(ValueError, match="group_tokens must be a positive even number, .* not 7"):
        models.build(config, group_tokens=7)
    model, params = model_of("tiny-llama", group_tokens=4)
    with pytest.raises(ValueError, match="a prompt or a prefix is in no group"):
        model.apply({**params, "prompt": {"embedding": jnp.ones((2, 32))}}, jnp.ones((1, 8), jnp.int32))
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        models.build(dataclasses.replace(config, head_dim=7))
