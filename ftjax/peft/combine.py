"""Several LoRAs into one: weighted sums, sums of factors, task-vector merges, and a cut back to a rank."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.peft import vectors
from ftjax.peft.lora import LoraWeight, lora
from ftjax.types import Params, Transform

Merge = Callable[[Sequence[np.ndarray], Sequence[float], np.random.Generator], np.ndarray]

FORMS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
HOW = ("cat", *FORMS, "svd", *(f"{form}_svd" for form in FORMS[1:]))


def combine(
    adapted: Sequence[Params],
    factors: Sequence[float] | None = None,
    *,
    how: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    sign: str = "total",
    seed: int = 0,
    name: str = "lora",
) -> tuple[Transform, Params]:
    """Return `(method, trainable)` of one LoRA made of several on the same base, as PEFT's `add_weighted_adapter`.

    With the change D_k = s_k A_k B_k of adapter k and its factor f_k the new change is

    - `"cat"`: Σ f_k D_k, exactly: the factors stand beside each other, and the ranks add up;
    - `"svd"`: Σ f_k D_k, cut to `rank` by its singular values: the nearest of that rank;
    - `"linear"`: (Σ √(f_k s_k) A_k) (Σ √(f_k s_k) B_k), which keeps the rank, and is no sum of the D_k: it has their cross terms too;
    - `"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`: those of `ftjax.peft.vectors` on A and on B, as `"linear"`;
    - the same with `_svd`: on the D_k, then cut to `rank`.

    Args:
      adapted: what `attach` returned for each adapter. One of them need not have every matrix of the others.
      factors: one for each; 1 each if None. May be negative.
      how: one of `HOW`.
      rank: of the `svd` forms; the largest of the adapters' if None.
      density: the share that the pruning forms keep.
      sign: see `vectors.ties`.
      seed: of what is dropped; it depends on this, the path and the layer alone.
      name: the key in the trainable tree.

    Raises:
      ValueError: there is no LoRA in a tree, an unknown `how`, or ranks differ where factors are added entry by entry.
    """
    if how not in HOW:
        raise ValueError(f"combine: there is no form {how!r}; nearest: {tree.nearest(how, HOW)}.")
    factors = [1.0] * len(adapted) if factors is None else list(factors)
    if len(factors) != len(adapted):
        raise ValueError(f"combine: {len(adapted)} adapters need as many factors, not {len(factors)}.")
    owned = [_loras(params, index) for index, params in enumerate(adapted)]
    form = "linear" if how in ("cat", "svd") else how.removesuffix("_svd")  # a sum; of factors that stand beside each other there is none
    merge, trained = _merge(form, density, sign), {}
    for path in sorted(set().union(*owned)):
        present = [(leaves[path], factor) for leaves, factor in zip(owned, factors, strict=True) if path in leaves]
        a, b = _one(path, [leaf for leaf, _ in present], [factor for _, factor in present], how, rank, merge, seed)
        trained[f"{path}/a"], trained[f"{path}/b"] = jnp.asarray(a), jnp.asarray(b)
    ranks = {path.removesuffix("/a"): leaf.shape[-1] for path, leaf in trained.items() if path.endswith("/a")}
    common = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != common}
    method = lora("|".join(map(re.escape, ranks)), rank=common, rank_pattern=others, name=name)  # alpha = rank: the scale is 1
    return method, {name: tree.unflatten(trained)}


def _loras(params: Params, index: int) -> Mapping[str, LoraWeight]:
    found = {path: leaf for path, leaf in tree.flatten(params).items() if isinstance(leaf, LoraWeight)}
    if not found:
        raise ValueError(f"combine: tree {index} has no LoRA; give what method.attach(frozen, trainable) returned.")
    return found


def _merge(form: str, density: float, sign: str) -> Merge:
    return {
        "linear": lambda xs, fs, random: vectors.linear(xs, fs),
        "magnitude_prune": lambda xs, fs, random: vectors.magnitude_prune(xs, fs, density=density),
        "ties": lambda xs, fs, random: vectors.ties(xs, fs, density=density, sign=sign),
        "dare_linear": lambda xs, fs, random: vectors.dare(xs, fs, density=density, random=random),
        "dare_ties": lambda xs, fs, random: vectors.dare_ties(xs, fs, density=density, random=random, sign=sign),
    }[form]


def _one(
    path: str, leaves: Sequence[LoraWeight], factors: Sequence[float], how: str, rank: int | None, merge: Merge, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of one path, layer by layer where there are layers."""
    ranks = [leaf.a.shape[-1] for leaf in leaves]
    if how in FORMS and len(set(ranks)) > 1:
        raise ValueError(f"combine: {how!r} adds factors entry by entry, and {path} has ranks {ranks}; use 'cat' or one of the svd forms.")
    stack = leaves[0].a.shape[:-2]
    flat = [
        [np.asarray(x, np.float32).reshape(-1, *x.shape[len(stack) :]) for x in (leaf.a, leaf.b, jnp.broadcast_to(leaf.scale, stack))]
        for leaf in leaves
    ]
    done = []
    for layer in range(flat[0][0].shape[0]):
        a, b, scales = zip(*([x[layer] for x in leaf] for leaf in flat), strict=True)
        weights = [factor * float(scale) for factor, scale in zip(factors, scales, strict=True)]
        random = np.random.default_rng([seed, zlib.crc32(path.encode()), layer])
        done.append(_layer(a, b, weights, factors, how, rank or max(ranks), merge, random))
    return tuple(np.stack(side).reshape(*stack, *side[0].shape) for side in zip(*done, strict=True))


def _layer(a, b, weights, factors, how, rank, merge, random) -> tuple[np.ndarray, np.ndarray]:
    if how == "cat":
        return np.concatenate(a, -1), np.concatenate([np.float32(w) * x for w, x in zip(weights, b, strict=True)], -2)
    if how in FORMS:
        roots = np.sqrt(np.abs(weights))
        return merge(a, roots * np.sign(weights), random), merge(b, roots, random)
    scales = [weight / factor if factor else 0.0 for weight, factor in zip(weights, factors, strict=True)]
    change = merge([np.float32(s) * x @ y for s, x, y in zip(scales, a, b, strict=True)], factors, random)
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    rank = min(rank, s.size)
    return u[:, :rank], s[:rank, None] * vt[:rank]
