"""LoRA: a frozen matrix plus a trained product of two thin ones."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax import tree, weights
from ftjax.peft import inits, low_rank
from ftjax.peft.format import Format, Tensor
from ftjax.peft.inits import FromWeight, Init, OfPath
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.riding import added
from ftjax.types import Params, Plan, Transform, pytree, static
from ftjax.weights import Leaf, Wrapper


class LowRankWeight(Wrapper):
    """A base with a thin product beside it: the fields of `LoraWeight`, and perhaps others. Abstract; `join` is the method."""

    @abc.abstractmethod
    def join(self, base: jax.Array, delta: jax.Array, x: jax.Array) -> jax.Array:
        """Return the product in the dtype of `base` from `base` = x W and `delta` = scale · dropped(x) A B in float32."""

    def delta(self) -> jax.Array:
        """Return `scale * a @ b`, float32 `[..., i, o]`."""
        return jnp.matmul(self.a, self.b) * self.scale[..., None, None]

    def dot(self, x: jax.Array) -> jax.Array:
        return self.join(weights.dot(x, self.base), thin(dropped(x, self.key, self.dropout), self.a, self.b, self.scale), x)

    def dots(self, x: jax.Array, ws: Sequence[Any]) -> tuple[jax.Array, ...]:
        # The thin products with A cost as much as dense ones, so those that read one x are done as one.
        fused = [n for n, w in enumerate(ws) if isinstance(w, type(self)) and w.key is None]
        if len(fused) < 2:
            return tuple(weights.dot(x, w) for w in ws)
        out = list(weights.dots(x, [w.base if n in fused else w for n, w in enumerate(ws)]))
        for n, delta in zip(fused, thins(x, [ws[n] for n in fused]), strict=True):
            out[n] = ws[n].join(out[n], delta, x)
        return tuple(out)


@pytree
class LoraWeight(LowRankWeight):
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
        return added(weights.materialize(self.base), self.delta())

    def join(self, base: jax.Array, delta: jax.Array, x: jax.Array) -> jax.Array:
        return added(base, delta)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        low = weights.dot_transposed(x.astype(jnp.float32), self.b) * self.scale
        return added(weights.dot_transposed(x, self.base), weights.dot_transposed(low, self.a))

    def embed(self, ids: jax.Array) -> jax.Array:
        return added(weights.embed(ids, self.base), weights.dot(weights.embed(ids, self.a) * self.scale, self.b))


def dropped(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Return x in float32, with entries zeroed at this rate if there is a key and the others scaled up."""
    x = x.astype(jnp.float32)
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def thin(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `scale * x @ a @ b`, float32 `[..., i] -> [..., o]`."""
    return widen(checkpoint_name(weights.dot(x, a), weights.LOW_RANK) * scale, b)


def thins(x: jax.Array, ws: Sequence[Any]) -> list[jax.Array]:
    """Return `thin` of x for several weights with `a`, `b` and `scale`, the products with all A done as one."""
    low = checkpoint_name(weights.dot(x.astype(jnp.float32), jnp.concatenate([w.a for w in ws], axis=-1)), weights.LOW_RANK)
    ends = list(itertools.accumulate(w.a.shape[-1] for w in ws))
    return [widen(low[..., end - w.a.shape[-1] : end] * w.scale, w.b) for end, w in zip(ends, ws, strict=True)]


@jax.custom_vjp
def widen(low: jax.Array, b: jax.Array) -> jax.Array:
    """Return `low @ b`, `[..., r] -> [..., o]`.

    The gradient of b is taken as lowᵀ dy. Left to itself JAX writes (dyᵀ low)ᵀ, and XLA on a CPU then copies all of dy transposed, which
    took a fifth of a step.
    """
    return weights.dot(low, b)


def _widen_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = residuals
    rows = tuple(range(low.ndim - 1))
    return weights.dot_transposed(d_y, b), jax.lax.dot_general(low, d_y, ((rows, rows), ((), ())))


widen.defvjp(lambda low, b: (weights.dot(low, b), (low, b)), _widen_backward)


def lora(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    init: Init | FromWeight | OfPath | str = "uniform",
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Layers | None = None,
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
      init: how A and B start: one of `ftjax.peft.inits`, by name or as a function. Those that start from the weight ("pissa", "olora",
        `corda(…)`, `lora_ga(…)`) keep A₀ and B₀ in the frozen tree under `name`, and leave the function unchanged to rounding.
      exclude: matrices to leave out among the targets.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
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
    make = inits.named(init, name)
    spec = low_rank.LowRank("lora", name, targets, rank, alpha, rslora, dropout, exclude, rank_pattern, alpha_pattern)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        trained = {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(key, params):
            here = inits.at(make, path)
            if isinstance(here, inits.FromWeight):
                factors = here.factors(leaf_key, weights.materialize(leaf).astype(jnp.float32), leaf_rank)
                root = jnp.sqrt(spec.scales(path, leaf.shape))[..., None, None] if here.divided else 1.0
                a, b = (factor / root for factor in factors)
            else:
                a, b = here(leaf_key, leaf.shape, leaf_rank)
            trained[f"{path}/a"], trained[f"{path}/b"] = a, b
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        return ride(spec, frozen, trainable, key=key)

    def plan(params: Params) -> tuple[Plan, ...]:
        rows = spec.plan(params)
        if not isinstance(inits.at(make, rows[0].paths[0]), inits.FromWeight):
            return rows
        return tuple(row._replace(options={**row.options, "init": init if isinstance(init, str) else "from weight"}) for row in rows)

    method = Transform(init_fn, attach, plan)
    return _since_start(method if layers is None else on_layers(method, layers), name)


def ride(spec: low_rank.LowRank, frozen: Params, trainable: Params, *, key: jax.Array | None) -> Params:
    """Return the tree with a `LoraWeight` on each leaf for which there are `a` and `b`."""
    rows = spec.joined(frozen, trainable, key=key)
    return tree.replace(frozen, {row.path: LoraWeight(row.base, row.fields["a"], row.fields["b"], row.scale, *row.dropout) for row in rows})


def _since_start(method: Transform, name: str) -> Transform:
    """Return the method whose term is what A B has become since it started, if it started from the weights."""

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        frozen, trainable = method.init(key, params)
        if not any(map(_from_weight, method.plan(params))):
            return frozen, trainable
        return {**frozen, name: jax.tree.map(jnp.copy, trainable[name])}, trainable  # the state is donated, the start must outlive it

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        model = {part: branch for part, branch in frozen.items() if part != name}
        return method.attach(model, relative(frozen, trainable, name), key=key)

    return method._replace(init=init, attach=attach)


def _from_weight(row: Plan) -> bool:
    return row.known_as == "lora" and "init" in row.options


def relative(frozen: Params, trainable: Params, name: str = "lora") -> Params:
    """Return `{name: tree}` of the plain LoRA on the frozen weights: that of rank 2r, s (A B - A₀ B₀), if it did not start at zero."""
    if name not in frozen:
        return {name: trainable[name]}
    now, start = tree.flatten(trainable[name]), tree.flatten(frozen[name])
    joined = {
        path: jnp.concatenate([x, start[path]], -1) if path.endswith("/a") else jnp.concatenate([x, -start[path]], -2)
        for path, x in now.items()
    }
    return {name: tree.unflatten(joined)}


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
