"""LoRA: a frozen matrix plus a trained product of two thin ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax import tree, weights
from ftjax.types import Params, Plan, Transform, pytree, static
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
        low = checkpoint_name(weights.dot(self._dropped(x), self.a), weights.LOW_RANK)
        return _add(weights.dot(x, self.base), _widen(low * self.scale, self.b))

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
        low = checkpoint_name(weights.dot(x.astype(jnp.float32), jnp.concatenate([ws[n].a for n in fused], axis=-1)), weights.LOW_RANK)
        start = 0
        for n in fused:
            rank = ws[n].a.shape[-1]
            out[n] = _add(out[n], _widen(low[..., start : start + rank] * ws[n].scale, ws[n].b))
            start += rank
        return tuple(out)

    def _dropped(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.key is None:
            return x
        keep = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), 0.0)


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
    if isinstance(init, str) and init not in INITS:
        raise ValueError(f"{name}: there is no init {init!r}; nearest: {tree.nearest(init, INITS)}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout is a probability in [0, 1), not {dropout}.")
    make = INITS[init] if isinstance(init, str) else init
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})

    def rank_of(path: str) -> int:
        return _lookup(ranks, path, rank)

    def scale_of(path: str) -> float:
        r = rank_of(path)
        return _lookup(alphas, path, r if alpha is None else alpha) / (math.sqrt(r) if rslora else r)

    def paths(params: Params) -> tuple[str, ...]:
        found = tree.matches(params, targets, who=name, exclude=exclude)
        for pattern in (*ranks, *alphas):
            if not any(_applies(pattern, path) for path in found):
                raise ValueError(f"{name}: pattern {pattern!r} matches none of the targets; nearest: {tree.nearest(pattern, found)}.")
        return found

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        flat, trained = tree.flatten(params), {}
        for path in paths(params):
            shape = flat[path].shape
            _check_matrix(name, path, shape, rank_of(path))
            # A key of its own for each path: what a leaf starts from does not depend on which others are trained.
            a, b = make(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, rank_of(path))
            trained[f"{path}/a"], trained[f"{path}/b"] = a, b
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        flat, factors = tree.flatten(frozen), tree.flatten(trainable[name])
        leaves = {}
        for path in (path.removesuffix("/a") for path in factors if path.endswith("/a")):
            if path not in flat:
                raise ValueError(f"{name}: the adapter has {path!r}, which this model has not; nearest: {tree.nearest(path, flat)}.")
            a, b, base = factors[f"{path}/a"], factors[f"{path}/b"], flat[path]
            layers = base.shape[:-2]
            layer_keys = None
            if key is not None and dropout:
                layer_keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), layers) if layers else key
            leaves[path] = LoraWeight(
                base, a, b, jnp.full(layers, scale_of(path), jnp.float32), layer_keys, dropout if layer_keys is not None else 0.0
            )
        return tree.replace(frozen, leaves)

    def plan(params: Params) -> tuple[Plan, ...]:
        groups: dict[tuple[int, float], list[str]] = {}
        for path in paths(params):
            groups.setdefault((rank_of(path), _lookup(alphas, path, rank_of(path) if alpha is None else alpha)), []).append(path)
        return tuple(
            Plan(name, tree.describe(targets), tuple(found), {"rank": r, "alpha": s, "rslora": rslora, "dropout": dropout})
            for (r, s), found in groups.items()
        )

    return Transform(init_fn, attach, plan)


def _applies(pattern: str, path: str) -> bool:
    return tree.predicate(pattern)(path) or tree.predicate([pattern])(path)


def _lookup(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _applies(pattern, path)), default)


def _check_matrix(name: str, path: str, shape: tuple[int, ...], rank: int) -> None:
    if len(shape) < 2 or not path.endswith("kernel"):
        raise ValueError(f"{name}: {path!r} with shape {list(shape)} is not a matrix; target kernels, or train it with full().")
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"{name}: rank {rank} does not fit {path!r} with shape {list(shape)}: expected 1 to {min(shape[-2:])}.")
