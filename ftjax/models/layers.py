"""The parts that every family is made of, as `flax.nnx` modules: what parameters there are, and what is done with them.

Modules multiply through `ftjax.weights`, so any parameter may be a `Weight`. They hold no state and know nothing of stacking, scanning
or caching: those live in `ftjax.models.decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ftjax import weights
from ftjax.kernels import attention as attention_op
from ftjax.models import cache as cache_lib
from ftjax.models import rope, virtual
from ftjax.models.config import Config
from ftjax.types import Params

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Scene(NamedTuple):
    """What a layer must know beside its input: where the tokens stand, what came before, and how this layer looks at them."""

    cos: jax.Array
    """float32 `[b, t, c/2]`."""
    sin: jax.Array
    positions: jax.Array
    """int `[b, t]`."""
    segment_ids: jax.Array
    window: jax.Array | int | None
    implementation: str
    """Of attention."""
    layer: jax.Array
    """int32 scalar: the index of this layer."""
    start: jax.Array | None = None
    """The slot of the cache that the first token takes; None without a cache."""
    kv_positions: jax.Array | None = None
    """int `[b, s]`: those of all keys that attention gets: of the cached slots, or of a prefix and these tokens."""
    kv_segment_ids: jax.Array | None = None
    slots: Params = {}
    """What methods have added to this layer, by the name of the slot: the branch `layers/slots` of the parameters, empty by default."""
    group_tokens: int | None = None
    """The size of the groups that attention stays in, or None: see `ftjax.kernels.attention.groups`."""

    def beside(self, module: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the output `y` of a module, plus what methods run beside it on its input `x`: the slot of its name."""
        for weight in self.slots.get(module, {}).values():
            y = y + weights.dot(x, weight)
        return y


KeysValues = tuple[jax.Array, jax.Array] | None
"""The cached keys and values of all layers, `[l, b, k, s, c]` each, or of this one where layers lie apart: `[b, k, s, c]`."""


class Linear(nnx.Module):
    """`y = x W + bias`, `[..., i] -> [..., o]`."""

    def __init__(self, i: int, o: int, config: Config, *, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_normal(rngs, (i, o), config))
        if bias:
            self.bias = nnx.Param(jnp.zeros((o,), config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return linears(x, (self,))[0]


def linears(x: jax.Array, modules: Sequence[Linear], *, keep: bool = True) -> tuple[jax.Array, ...]:
    """Return `[m(x) for m in modules]`; weights that share their input may share work.

    `keep` has the products stored for the backward pass, and not computed again, where `decoder.REMAT` chooses between the two.
    """
    ys = weights.dots(x, [m.kernel.get_value() for m in modules])
    ys = [checkpoint_name(y, weights.PRODUCT) for y in ys] if keep else ys
    return tuple(_add_bias(y, m.bias.get_value()) if "bias" in vars(m) else y for y, m in zip(ys, modules, strict=True))


class Embed(nnx.Module):
    """A table of vectors `[v, d]`, which may also serve as the output head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_normal(rngs, (config.vocab_size, config.hidden_size), config))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return weights.embed(ids, self.kernel.get_value())


class RMSNorm(nnx.Module):
    """`y = x / sqrt(mean(x²) + eps) · (center + scale)`, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    `center` is what the stored scale is relative to: 0 in most families, 1 in Gemma.
    """

    def __init__(self, size: int, config: Config, *, center: float = 0.0):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - center, config.dtype))
        self.center = center
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = self.center + weights.materialize(self.scale.get_value()).astype(jnp.float32)
        return (y * _as_last(scale, y)).astype(x.dtype)


class MLP(nnx.Module):
    """`y = (act(x Wg) ⊙ x Wu) Wd`: a gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, f, config, bias=bias, rngs=rngs)
        self.up_proj = Linear(d, f, config, bias=bias, rngs=rngs)
        self.down_proj = Linear(f, d, config, bias=bias, rngs=rngs)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array, scene: Scene) -> jax.Array:
        gate, up = linears(x, (self.gate_proj, self.up_proj))
        # In float32 as one fusion: rounding to bfloat16 after each of its steps would cost more time, and accuracy.
        y = self.act(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return scene.beside("mlp", x, self.down_proj(y.astype(x.dtype)))


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and rotary positions.

    Args:
      config: the architecture.
      biases: which of q, k, v, o add a bias.
      qk_norm_center: normalise each query and key head with an `RMSNorm` of this center before turning it; None for not.
    """

    def __init__(self, config: Config, *, biases: str = "", qk_norm_center: float | None = None, rngs: nnx.Rngs):
        d, c = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * c, config.num_key_value_heads * c
        self.q_proj = Linear(d, q, config, bias="q" in biases, rngs=rngs)
        self.k_proj = Linear(d, kv, config, bias="k" in biases, rngs=rngs)
        self.v_proj = Linear(d, kv, config, bias="v" in biases, rngs=rngs)
        self.o_proj = Linear(q, d, config, bias="o" in biases, rngs=rngs)
        self.normed = qk_norm_center is not None
        if self.normed:
            self.q_norm = RMSNorm(c, config, center=qk_norm_center)
            self.k_norm = RMSNorm(c, config, center=qk_norm_center)
        self.head_dim = c
        self.softcap = config.attn_logit_softcapping
        self.attention_scale = config.attention_scale

    def __call__(self, x: jax.Array, scene: Scene, cached: KeysValues) -> tuple[jax.Array, KeysValues]:
        b, t, _ = x.shape
        # Attention's gradient needs q and k as they are turned; as they come from the product only a norm's does.
        q, k, v = (y.reshape(b, t, -1, self.head_dim) for y in linears(x, (self.q_proj, self.k_proj, self.v_proj), keep=self.normed))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, scene.cos, scene.sin), rope.rotate(k, scene.cos, scene.sin)
        q, k, v = (checkpoint_name(y, weights.PRODUCT) for y in (q, k, v))
        if cached is not None:
            all_k, k = cache_lib.write(cached[0], scene.layer, scene.start, k)
            all_v, v = cache_lib.write(cached[1], scene.layer, scene.start, v)
            cached = (all_k, all_v)
        elif virtual.PREFIX in scene.slots:
            k, v = virtual.behind_prefix(scene.slots[virtual.PREFIX], k, v)
        y = attention_op.attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            q_positions=scene.positions,
            kv_positions=scene.kv_positions,
            q_segment_ids=scene.segment_ids,
            kv_segment_ids=scene.kv_segment_ids,
            window=scene.window,
            group_tokens=scene.group_tokens,
            softcap=self.softcap,
            scale=self.attention_scale,
            implementation=scene.implementation,
        )
        return scene.beside("self_attn", x, self.o_proj(y.reshape(b, t, -1))), cached


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: Config) -> jax.Array:
    return (config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(config.dtype)


def _add_bias(y: jax.Array, bias: weights.Leaf) -> jax.Array:
    return y + _as_last(weights.materialize(bias).astype(y.dtype), y)


def _as_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
