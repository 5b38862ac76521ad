"""A Linen and an NNX transformer that know nothing of ftjax train through an adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from ftjax import models, tree, weights
from ftjax.models import bridge
from ftjax.types import pytree

VOCAB, D, HEADS = 11, 8, 2


class LinenTransformer(linen.Module):
    logits: bool = True

    @linen.compact
    def __call__(self, tokens, position_ids=None):
        embed = linen.Embed(VOCAB, D)
        position_ids = jnp.arange(tokens.shape[1])[None, :] * jnp.ones_like(tokens) if position_ids is None else position_ids
        x = embed(tokens) + linen.Embed(16, D)(position_ids)
        mask = linen.make_causal_mask(tokens)
        x = x + linen.MultiHeadDotProductAttention(HEADS)(linen.RMSNorm()(x), mask=mask)
        x = x + linen.Dense(D)(linen.gelu(linen.Dense(2 * D)(linen.RMSNorm()(x))))
        return linen.Dense(VOCAB, use_bias=False)(x) if self.logits else x


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.mlp = nnx.List([nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.norm = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens))
        return x + self.dropout(self.mlp[1](jnp.tanh(self.mlp[0](x))))


CASES = {
    "linen": (lambda: bridge.from_linen(LinenTransformer()), "Dense_0/kernel"),
    "linen hidden": (lambda: bridge.from_linen(LinenTransformer(logits=False), head="Embed_0/embedding", tied=True), "Dense_1/kernel"),
    "nnx": (lambda: bridge.from_nnx(NnxTransformer, head="embed/embedding", tied=True), "mlp/0/kernel"),
}


@pytree
class LowRank(weights.Weight):
    base: jax.Array
    a: jax.Array
    b: jax.Array

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self):
        return self.base + self.a @ self.b


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_module_trains_through_an_adapter(case, key):
    make, path = CASES[case]
    model = make()
    params = model.init(key)
    base = tree.flatten(params)[path]
    tokens = jnp.arange(36).reshape(4, 9) % VOCAB

    def loss(ab):
        attached = tree.replace(params, {path: LowRank(base, *ab)})
        hidden, cache = model.apply(attached, tokens)
        assert cache is None
        logits = model.unembed(model.head(attached), hidden)
        assert logits.shape == (4, 9, VOCAB) and logits.dtype == jnp.float32
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))

    step = jax.jit(lambda ab: jax.tree.map(lambda x, g: x - 0.5 * g, ab, jax.grad(loss)(ab)))
    ab = (jax.random.normal(key, (base.shape[0], 4)), jnp.zeros((4, base.shape[1])))
    before = loss(ab)
    for _ in range(20):
        ab = step(ab)
    assert loss(ab) < 0.9 * before
    assert jnp.all(jnp.isfinite(ab[0]))


def test_the_bridge_computes_what_the_module_computes(key):
    module, tokens = NnxTransformer(nnx.Rngs(3)), jnp.array([[1, 2, 3]])
    model = bridge.from_nnx(NnxTransformer)
    params = bridge.nnx_params(module)
    assert set(tree.flatten(params)) == set(tree.flatten(jax.eval_shape(model.init, key))) and "mlp/1/bias" in tree.flatten(params)
    np.testing.assert_array_equal(model.apply(params, tokens)[0], module(tokens))


def test_positions_reach_a_module_that_names_them(key):
    model = bridge.from_linen(LinenTransformer(), positions="position_ids")
    params, tokens = model.init(key), jnp.array([[1, 2, 3]])
    same, _ = model.apply(params, tokens, positions=jnp.array([[0, 1, 2]]))
    np.testing.assert_array_equal(same, model.apply(params, tokens)[0])
    assert not np.array_equal(same, model.apply(params, tokens, positions=jnp.array([[5, 6, 7]]))[0])


def test_what_a_foreign_module_cannot_do_is_said(key):
    model = bridge.from_linen(LinenTransformer())
    cache = models.init_cache(models.preset("tiny-llama"), 1, 4)
    with pytest.raises(ValueError, match="no key/value cache"):
        model.apply(model.init(key), jnp.array([[1]]), cache=cache)
    with pytest.raises(ValueError, match="no head 'lm_head/kernel'.*'Dense_2/kernel'"):
        bridge.from_linen(LinenTransformer(), head="lm_head/kernel")

    class Counting(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            return linen.BatchNorm(use_running_average=True)(linen.Embed(VOCAB, D)(tokens))

    with pytest.raises(ValueError, match="Counting has variables beside its parameters: batch_stats"):
        bridge.from_linen(Counting())


def test_a_foreign_module_refuses_what_it_would_not_read(key):
    model = bridge.from_linen(LinenTransformer())
    slots = {"slots": {"mlp": {"parallel_bottleneck": jnp.ones((1, 2, 2))}}}
    with pytest.raises(ValueError, match="hold 'layers/slots/mlp/parallel_bottleneck', for which this module has no place"):
        model.apply({**model.init(key), "layers": slots}, jnp.ones((1, 3), jnp.int32))
