"""LoftQ: a packed matrix and a low-rank term that are made together, so that their sum is near the dense matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import quant, tree
from ftjax.peft import inits, low_rank
from ftjax.peft.lora import LORA, ride
from ftjax.quant import QuantizedWeight
from ftjax.types import Params, Plan, Transform
from ftjax.weights import Weight


def loftq(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    format: str = "nf4",
    group: int | None = 64,
    nested: bool = True,
    iterations: int = 1,
    svd_iterations: int | None = None,
    seed: int = 0,
    rslora: bool = False,
    dropout: float = 0.0,
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    name: str = "loftq",
) -> Transform:
    """Quantise frozen matrices, and start their low-rank terms at the largest part of what that lost.

    y = x Q + s · dropout(x) A B,   s = alpha / rank   (rsLoRA: alpha / √rank)
    Q_t = q(W - s A_(t-1) B_(t-1)),   s A_t B_t = SVD_r(W - Q_t),   A_0 B_0 = 0;   t = 1 … iterations

    Li et al., 2023, arXiv:2310.08659, algorithm 1. The singular values are shared evenly: A = U √S / √s, B = √S Vᵀ / √s. Dividing by s is
    what makes Q + s A B near W; PEFT 0.21 does not, and is near W only where alpha = r. Here W is seen in float32, and Q counts with its
    nested scales. How much nearer SmolLM2 starts is in `experiments/quant_error`.

    The base is part of the method: the frozen tree alone is Q, further from the dense model than where training starts. It is made of the
    dense matrices once more wherever the adapter is loaded. After one iteration Q = q(W), whatever A and B are, so an adapter on nf4 with
    groups of 64 and nested scales is a plain LoRA in PEFT's form, for a model that bitsandbytes loads so (`load_in_4bit`, "nf4",
    `bnb_4bit_use_double_quant`). After more, Q is one that no loader makes: such an adapter is written in ftjax's own form, and loading it
    computes the iterations again.

    Args:
      targets: which matrices, dense (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None.
      format: of `ftjax.quant.SPECS`.
      group: consecutive rows (of `[i, o]`) that share a scale; None: all.
      nested: quantise the scales too.
      iterations: how often both are made, from 1.
      svd_iterations: power iterations of a randomised SVD (see `ftjax.peft.inits.pissa`); None: exact.
      seed: of the randomised SVD. The key of `init` is not used, so that the base can be made again.
      rslora: divide by √rank instead of rank.
      dropout: probability, in [0, 1), of zeroing an entry of x on the low-rank path; it acts only where `attach` is given a key.
      exclude: matrices to leave out among the targets; they stay dense.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, a leaf that is no matrix, or one that is quantised already; an argument is out of range; the
        rows do not divide into groups; a matrix, if it is not traced, has a number that is not finite.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (2, 64, 6))}}}
      >>> frozen, trainable = loftq(["q_proj"], rank=2, iterations=3).init(jax.random.key(0), params)
      >>> frozen["layers"]["q_proj"]["kernel"].codes.shape, trainable["loftq"]["layers"]["q_proj"]["kernel"]["b"].shape
      ((2, 32, 6), (2, 2, 6))
    """
    if iterations < 1:
        raise ValueError(f"{name}: iterations is at least 1, not {iterations}.")
    spec = low_rank.LowRank("loftq", name, targets, rank, alpha, rslora, dropout, exclude, rank_pattern, alpha_pattern)
    quantize = partial(quant.quantize, format=format, group=group, nested=nested)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        del key
        packed, trained = {}, {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(jax.random.key(seed), params):
            if isinstance(leaf, Weight):
                raise ValueError(f"{name}: {path!r} is a {type(leaf).__name__} already; the dense matrix is needed: put loftq first.")
            principal = partial(inits.pissa(svd_iterations).factors, rank=leaf_rank)
            try:
                base, a, b = over_layers(partial(alternate, quantize, principal, iterations), leaf_key, leaf)
            except ValueError as error:
                raise ValueError(f"{name}: {path!r}: {error} Choose another group, or exclude it.") from error
            root = jnp.sqrt(spec.scales(path, leaf.shape))[..., None, None]
            packed[path] = dataclasses.replace(base, dtype_name=jnp.dtype(leaf.dtype).name)
            trained[f"{path}/a"], trained[f"{path}/b"] = a / root, b / root
        quant.check_finite(name, packed)
        return tree.replace(params, packed), {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        return ride(spec, frozen, trainable, key=key)

    def plan(params: Params) -> tuple[Plan, ...]:
        made = {"format": format, "group": group, "nested": nested, "iterations": iterations}
        return tuple(row._replace(options={**row.options, **made}) for row in spec.plan(params))

    return Transform(init_fn, attach, plan)


def alternate(
    quantize: Callable[[jax.Array], QuantizedWeight], principal: Callable[..., inits.Factors], iterations: int, key: jax.Array, w: jax.Array
) -> tuple[QuantizedWeight, jax.Array, jax.Array]:
    """Return Q, A and B with Q + A B near w `[i, o]`: the iterations of `loftq` at scale 1."""
    w = w.astype(jnp.float32)
    term = jnp.zeros_like(w)
    for _ in range(iterations):
        base = quantize(w - term)
        a, b = principal(key, w - base.materialize())
        term = a @ b
    return base, a, b


def over_layers(function: Callable[[jax.Array, jax.Array], Any], key: jax.Array, stack: jax.Array) -> Any:
    """Map `function(key, matrix)` over the layers of a stack, one after another, so that only one is there in float32."""
    if stack.ndim == 2:
        return function(key, stack)
    return jax.lax.map(lambda one: over_layers(function, *one), (jax.random.split(key, len(stack)), stack))


def base(params: Params, plans: Sequence[Plan]) -> Params:
    """Return the frozen tree of adapters of one iteration, from their plans and the dense model: Q needs no A and B then.

    Raises:
      ValueError: a matrix is quantised already, and otherwise.
    """
    for row in plans:
        options = {name: row.options[name] for name in ("format", "group", "nested")}
        params, _ = quant.quantized(targets=row.paths.__contains__, name=row.method, **options).init(jax.random.key(0), params)
    return params


LOFTQ = LORA._replace(
    only={"format": "nf4", "group": 64, "nested": True, "iterations": 1},
    constants={"loftq_config": {"loftq_bits": 4, "loftq_iter": 1, "base": "nf4, group 64, nested"}},
    base=base,
)
"""PEFT says that it ignores this `loftq_config`, for the adapter has started; by it a folder is known to be one for a quantised base."""
