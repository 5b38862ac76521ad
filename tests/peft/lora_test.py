import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import tree, weights
from ftjax.peft import lora
from ftjax.peft.inits import INITS
from ftjax.peft.lora import LoraWeight

LAYERS, IN, OUT, R = 2, 6, 5, 3
Q, K = "layers/self_attn/q_proj/kernel", "layers/self_attn/k_proj/kernel"


@pytest.fixture
def params(key):
    keys = jax.random.split(key, 3)
    leaf = lambda key, *shape: {"kernel": jax.random.normal(key, shape)}  # noqa: E731
    return {
        "embed_tokens": leaf(keys[0], 11, IN),
        "layers": {
            "self_attn": {"q_proj": leaf(keys[1], LAYERS, IN, OUT), "k_proj": leaf(keys[2], LAYERS, IN, OUT)},
            "input_layernorm": {"scale": jnp.ones((LAYERS, IN))},
        },
    }


def random_weight(key, shape, rank=R, scale=0.7, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    a = jax.random.normal(keys[1], (*shape[:-1], rank))
    b = jax.random.normal(keys[2], (*shape[:-2], rank, shape[-1]))
    return LoraWeight(jax.random.normal(keys[0], shape, dtype), a, b, jnp.full(shape[:-2], scale, jnp.float32))


def test_every_product_equals_the_formula_in_float64(key):
    w = random_weight(key, (IN, OUT))
    base, a, b = (np.asarray(x, np.float64) for x in (w.base, w.a, w.b))
    dense = base + 0.7 * a @ b
    x, y, ids = jax.random.normal(key, (2, 4, IN)), jax.random.normal(key, (2, 4, OUT)), jnp.array([[0, 3], [5, 1]])
    np.testing.assert_allclose(weights.materialize(w), dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.dot(x, w), np.asarray(x, np.float64) @ dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights.dot_transposed(y, w), np.asarray(y, np.float64) @ dense.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights.embed(ids, w), dense[np.asarray(ids)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("members", ["LL", "LAL", "AL", "LLL"])
def test_fused_products_equal_separate_ones(key, members):
    keys = jax.random.split(key, len(members))
    ws = [
        random_weight(k, (IN, OUT + n), rank=n + 1) if m == "L" else jax.random.normal(k, (IN, OUT))
        for n, (m, k) in enumerate(zip(members, keys, strict=True))
    ]
    x = jax.random.normal(key, (2, 4, IN))
    for got, w in zip(weights.dots(x, ws), ws, strict=True):
        np.testing.assert_allclose(got, x @ weights.materialize(w), rtol=1e-4, atol=1e-5)


def test_factors_stay_float32_over_a_bfloat16_base(key, params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    method = lora(["q_proj"], rank=R)
    frozen, trainable = method.init(key, half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}
    leaf = tree.flatten(method.attach(frozen, trainable))[Q]
    assert leaf.dtype == weights.materialize(leaf).dtype == jnp.bfloat16


@pytest.mark.parametrize("options, scale", [({}, 1.0), ({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rslora": True}, 6 / 3**0.5)])
def test_the_scale_is_alpha_over_rank_or_its_root(key, params, options, scale):
    method = lora(["q_proj"], rank=3, **options)
    np.testing.assert_allclose(tree.flatten(method.attach(*method.init(key, params)))[Q].scale, np.full(LAYERS, scale), rtol=1e-6)


@pytest.mark.parametrize("init", ["uniform", "gaussian", "a_zero"])
def test_exactly_one_factor_starts_at_zero(key, params, init):
    method = lora(["q_proj"], rank=R, init=init)
    _, trainable = method.init(key, params)
    a, b = (tree.flatten(trainable)[f"lora/{Q}/{name}"] for name in "ab")
    assert (float(jnp.abs(a).max()) == 0) != (float(jnp.abs(b).max()) == 0)


def test_uniform_has_the_bounds_that_peft_uses(key):
    a, _ = INITS["uniform"](key, (4, 100, 8), 16)
    assert 0.098 < float(jnp.abs(a).max()) <= 0.1  # 1 / sqrt(100)
    assert float(a.std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_where_a_leaf_starts_does_not_depend_on_the_others(key, params):
    alone = lora(["q_proj"], rank=R).init(key, params)[1]
    together = lora(["q_proj", "k_proj"], rank=R).init(key, params)[1]
    np.testing.assert_array_equal(tree.flatten(alone)[f"lora/{Q}/a"], tree.flatten(together)[f"lora/{Q}/a"])
    assert not np.array_equal(tree.flatten(together)[f"lora/{Q}/a"], tree.flatten(together)[f"lora/{K}/a"])


def test_patterns_give_ranks_and_alphas_by_path(key, params):
    method = lora("all-linear", rank=2, alpha=4, rank_pattern={"q_proj": 3}, alpha_pattern={r".*/k_proj/kernel": 1.0})
    frozen, trainable = method.init(key, params)
    flat = tree.flatten(method.attach(frozen, trainable))
    assert (flat[Q].a.shape[-1], flat[K].a.shape[-1]) == (3, 2)
    np.testing.assert_allclose([flat[Q].scale[0], flat[K].scale[0]], [4 / 3, 1 / 2], rtol=1e-6)
    assert {(row.options["rank"], row.options["alpha"]) for row in method.plan(params)} == {(3, 4), (2, 1.0)}


def test_dropout_acts_with_a_key_and_only_then(key, params):
    method = lora(["q_proj"], rank=R, dropout=0.5, init="uniform")
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    x = jnp.ones((3, 4, IN))

    def first(params):
        return weights.dot(x, jax.tree.map(lambda leaf: leaf[0], tree.flatten(params)[Q]))

    plain, dropped = first(method.attach(frozen, trainable)), first(method.attach(frozen, trainable, key=key))
    np.testing.assert_allclose(plain, x @ weights.materialize(tree.flatten(method.attach(frozen, trainable))[Q])[0], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(plain - dropped).max()) > 1e-3
    assert not np.array_equal(dropped, first(method.attach(frozen, trainable, key=jax.random.key(1))))


def test_dropout_keeps_the_mean_and_differs_by_layer(key):
    keys = jax.random.split(key, 2)
    w = LoraWeight(jnp.zeros((2, 1, 1)), jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)), jnp.ones(2), keys, dropout=0.25)
    x = jnp.ones((4000, 1))
    outs = [weights.dot(x, jax.tree.map(lambda leaf, n=n: leaf[n], w)) for n in range(2)]
    assert float(outs[0].mean()) == pytest.approx(1.0, abs=0.03)
    assert set(np.unique(outs[0]).round(4)) == {0.0, np.float32(1.3333)}
    assert not np.array_equal(*outs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ["input_layernorm"]}, "not a matrix"),
        ({"targets": ["q_proj"], "rank": 6}, "expected 1 to 5"),
        ({"targets": ["q_proj"], "rank": 0}, "expected 1 to 5"),
        ({"targets": ["q_prj"]}, "q_proj"),
        ({"targets": ["q_proj"], "init": "gausian"}, "gaussian"),
        ({"targets": ["q_proj"], "dropout": 1.0}, r"\[0, 1\)"),
        ({"exclude": ["q_prj"]}, r"lora.exclude: no module is named 'q_prj'; nearest: 'q_proj'"),
        ({"exclude": ".*/v_proj/kernel"}, r"lora.exclude: pattern .* matched no leaf; nearest: "),
        ({"exclude": "all-linear"}, "lora: 'all-linear' without 'all-linear' leaves nothing to train"),
        ({"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "none of the targets"),
    ],
)
def test_bad_options_say_what_was_expected(key, params, options, message):
    with pytest.raises(ValueError, match=message):
        lora(**{"rank": 2, **options}).init(key, params)


def test_an_adapter_of_another_model_is_refused(key, params):
    method = lora(["q_proj"], rank=2)
    _, trainable = method.init(key, params)
    del params["layers"]["self_attn"]["q_proj"]
    with pytest.raises(ValueError, match="this model has not"):
        method.attach(params, trainable)
