"""LoRA: a frozen matrix plus a trained product of two thin ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax import tree, weights
from ftjax.peft import low_rank
from ftjax.peft.format import Format, Tensor
from ftjax.types import Params, Transform, pytree, static
from ftjax.weights import Leaf, Wrapper

Init = Callable[[jax.Array, tuple[int, ...], int], tuple[jax.Array, jax.Array]]
"""`(key, shape [..., i, o], rank) -> (a [..., i, r], b [..., r, o])`, float32, with `a @ b == 0`."""


@pytree
class LoraWeight(Wrapper):
    """`materialize() == base + scale * a @ b`, with `a` and `b` in float32 over a base of any kind."""

    base: Leaf
    """`[..., i, o]`."""
    a: jax.Array
    """`[..., i, r]`."""
    b: jax.Array
    """`[..., r, o]`."""
    scale: jax.Array
    """`[...]`: alpha / rank for each stacked layer."""
    key: jax.Array | None = None
    """`[...]`: a key for each stacked layer while training with dropout, else None."""
    dropout: float = static(default=0.0)

    def materialize(self) -> jax.Array:
        base = weights.materialize(self.base)
        delta = jnp.matmul(self.a, self.b) * self.scale[..., None, None]
        return (base.astype(jnp.float32) + delta).astype(base.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        return _add(weights.dot(x, self.base), thin(dropped(x, self.key, self.dropout), self.a, self.b, self.scale))

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        low = weights.dot_transposed(x.astype(jnp.float32), self.b) * self.scale
        return _add(weights.dot_transposed(x, self.base), weights.dot_transposed(low, self.a))

    def embed(self, ids: jax.Array) -> jax.Array:
        return _add(weights.embed(ids, self.base), weights.dot(weights.embed(ids, self.a) * self.scale, self.b))

    def dots(self, x: jax.Array, ws: Sequence[Any]) -> tuple[jax.Array, ...]:
        # The thin products with A cost as much as dense ones, so those that read one x are done as one.
        fused = [n for n, w in enumerate(ws) if isinstance(w, LoraWeight) and w.key is None]
        if len(fused) < 2:
            return tuple(weights.dot(x, w) for w in ws)
        out = list(weights.dots(x, [w.base if n in fused else w for n, w in enumerate(ws)]))
        for n, delta in zip(fused, thins(x, [ws[n] for n in fused]), strict=True):
            out[n] = _add(out[n], delta)
        return tuple(out)


def dropped(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Return x in float32, with entries zeroed at this rate if there is a key and the others scaled up."""
    x = x.astype(jnp.float32)
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def thin(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `scale * x @ a @ b`, float32 `[..., i] -> [..., o]`."""
    return _widen(checkpoint_name(weights.dot(x, a), weights.LOW_RANK) * scale, b)


def thins(x: jax.Array, ws: Sequence[Any]) -> list[jax.Array]:
    """Return `thin` of x for several weights with `a`, `b` and `scale`, the products with all A done as one."""
    low = checkpoint_name(weights.dot(x.astype(jnp.float32), jnp.concatenate([w.a for w in ws], axis=-1)), weights.LOW_RANK)
    ends = list(itertools.accumulate(w.a.shape[-1] for w in ws))
    return [_widen(low[..., end - w.a.shape[-1] : end] * w.scale, w.b) for end, w in zip(ends, ws, strict=True)]


@jax.custom_vjp
def _widen(low: jax.Array, b: jax.Array) -> jax.Array:
    """Return `low @ b`, `[..., r] -> [..., o]`.

    The gradient of b is taken as lowᵀ dy. Left to itself JAX writes (dyᵀ low)ᵀ, and XLA on a CPU then copies all of dy transposed, which
    took a fifth of a step.
    """
    return weights.dot(low, b)


def _widen_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = residuals
    rows = tuple(range(low.ndim - 1))
    return weights.dot_transposed(d_y, b), jax.lax.dot_general(low, d_y, ((rows, rows), ((), ())))


_widen.defvjp(lambda low, b: (weights.dot(low, b), (low, b)), _widen_backward)


def _add(y: jax.Array, delta: jax.Array) -> jax.Array:
    return (y.astype(jnp.float32) + delta).astype(y.dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], rank: int) -> tuple[jax.Array, jax.Array]:
    """A ~ U(-1/√i, 1/√i), B = 0: what PEFT does by default (Kaiming uniform with a = √5)."""
    *layers, i, o = shape
    bound = 1 / math.sqrt(i)
    return jax.random.uniform(key, (*layers, i, rank), jnp.float32, -bound, bound), jnp.zeros((*layers, rank, o), jnp.float32)


def gaussian(key: jax.Array, shape: tuple[int, ...], rank: int) -> tuple[jax.Array, jax.Array]:
    """A ~ N(0, 1/r²), B = 0: PEFT's `init_lora_weights="gaussian"`."""
    *layers, i, o = shape
    return jax.random.normal(key, (*layers, i, rank), jnp.float32) / rank, jnp.zeros((*layers, rank, o), jnp.float32)


def a_zero(key: jax.Array, shape: tuple[int, ...], rank: int) -> tuple[jax.Array, jax.Array]:
    """A = 0, B ~ U(-1/√r, 1/√r): the first Adam step then does not hang on the sign of tiny gradients of B."""
    *layers, i, o = shape
    bound = 1 / math.sqrt(rank)
    return jnp.zeros((*layers, i, rank), jnp.float32), jax.random.uniform(key, (*layers, rank, o), jnp.float32, -bound, bound)


INITS: dict[str, Init] = {"uniform": uniform, "gaussian": gaussian, "a_zero": a_zero}


def lora(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    init: Init | str = "uniform",
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    name: str = "lora",
) -> Transform:
    """Add a trained low-rank term to frozen matrices.

    y = x W + s · dropout(x) A B,   s = alpha / rank   (rsLoRA: alpha / √rank)

    Hu et al., 2021, arXiv 2106.09685, equation 3; the rsLoRA scale is Kalajdzievski, 2023, arXiv 2312.03732. A is `[i, r]` and B `[r, o]`,
    the transposes of the paper's and PEFT's. Both are float32 over any base; the sum is rounded once to the dtype of x. Where the
    embedding is targeted and tied to the output head the term acts in both places (in PEFT in the first alone).

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None, which makes the scale 1 (or √rank).
      rslora: divide by √rank instead of rank.
      dropout: probability, in [0, 1), of zeroing an entry of x on the low-rank path; it acts only where `attach` is given a key.
      init: how A and B start, with A B = 0: a function or one of `INITS`.
      exclude: matrices to leave out among the targets.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; a rank, alpha or dropout is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> method = lora(["q_proj"], rank=2, alpha=4)
      >>> frozen, trainable = method.init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'lora/layers/q_proj/kernel/a': (2, 4, 2), 'lora/layers/q_proj/kernel/b': (2, 2, 6)}
    """
    make = named_init(init, name)
    spec = low_rank.LowRank("lora", name, targets, rank, alpha, rslora, dropout, exclude, rank_pattern, alpha_pattern)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        trained = {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(key, params):
            trained[f"{path}/a"], trained[f"{path}/b"] = make(leaf_key, leaf.shape, leaf_rank)
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        rows = spec.joined(frozen, trainable, key=key)
        return tree.replace(
            frozen, {row.path: LoraWeight(row.base, row.fields["a"], row.fields["b"], row.scale, *row.dropout) for row in rows}
        )

    return Transform(init_fn, attach, spec.plan)


def named_init(init: Init | str, name: str) -> Init:
    """Return the function that `init` names among `INITS`, or `init` itself."""
    if isinstance(init, str) and init not in INITS:
        raise ValueError(f"{name}: there is no init {init!r}; nearest: {tree.nearest(init, INITS)}.")
    return INITS[init] if isinstance(init, str) else init


LORA = Format(
    peft_type="LORA",
    tensors={
        "a": Tensor("lora_A.weight", "ir->ri", embedding="lora_embedding_A"),
        "b": Tensor("lora_B.weight", "ro->or", embedding="lora_embedding_B"),
    },
    options={"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"},
    patterns=("rank", "alpha"),
    defaults={
        "r": 8,
        "exclude_modules": None,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "use_dora": False,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "monteclora_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "target_parameters": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
    },
    ignored=(
        *("init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        "ensure_weight_tying",
    ),
    refused={
        "init_lora_weights": ("pissa", "olora", "corda", "loftq", "lora_ga")
    },  # relative to other base weights than the published ones
    embeddings=True,
    scale=low_rank.scale,
    scaled="b",
)
