"""How a low-rank adapter starts: blind inits make A B = 0; the others start A B as a part of the weight, which is taken off again.

An init of the second kind leaves the base where it is. LoRA keeps what A B was at the start in the frozen tree and computes
x W + s (x A B - x A₀ B₀), which is what PEFT computes with a base W - s A₀ B₀, in value and gradient (but for dropout, which here acts on
both products). So the frozen tree stays the reference policy, its buffers stay shared, and the adapter is, at any time, a plain LoRA of
rank 2r on the published weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax import tree

Factors = tuple[jax.Array, jax.Array]
Init = Callable[[jax.Array, tuple[int, ...], int], Factors]
"""`(key, shape [..., i, o], rank) -> (a [..., i, r], b [..., r, o])`, float32, with `a @ b == 0`."""


class FromWeight(NamedTuple):
    """An init that reads the weight."""

    factors: Callable[[jax.Array, jax.Array, int], Factors]
    """`(key, weight float32 [..., i, o], rank) -> (a, b)`: A B is the part of the weight that is trained."""


def uniform(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A ~ U(-1/√i, 1/√i), B = 0: what PEFT does by default (Kaiming uniform with a = √5)."""
    *layers, i, o = shape
    bound = 1 / math.sqrt(i)
    return jax.random.uniform(key, (*layers, i, rank), jnp.float32, -bound, bound), jnp.zeros((*layers, rank, o), jnp.float32)


def gaussian(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A ~ N(0, 1/r²), B = 0: PEFT's `init_lora_weights="gaussian"`."""
    *layers, i, o = shape
    return jax.random.normal(key, (*layers, i, rank), jnp.float32) / rank, jnp.zeros((*layers, rank, o), jnp.float32)


def a_zero(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A = 0, B ~ U(-1/√r, 1/√r): the first Adam step then does not hang on the sign of tiny gradients of B."""
    *layers, i, o = shape
    bound = 1 / math.sqrt(rank)
    return jnp.zeros((*layers, i, rank), jnp.float32), jax.random.uniform(key, (*layers, rank, o), jnp.float32, -bound, bound)


def orthogonal(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A = N Q₁ / 10, B = Q₂ᵀ N' / 10: neither is zero and A B is, because Q₁ and Q₂ are orthogonal halves of one rotation.

    PEFT's `init_lora_weights="orthogonal"`, after D. Oh (2025). N and N' are standard normal. Zero to rounding, not exactly.
    """
    if rank % 2:
        raise ValueError(f"inits: orthogonal needs an even rank, not {rank}.")
    *layers, i, o = shape
    turn_key, a_key, b_key = jax.random.split(key, 3)
    turn, _ = jnp.linalg.qr(jax.random.normal(turn_key, (*layers, rank, rank), jnp.float32))
    odd, even = turn[..., 1::2, :], turn[..., 0::2, :]
    a = jax.random.normal(a_key, (*layers, i, rank // 2), jnp.float32) @ odd / 10
    return a, jnp.swapaxes(even, -1, -2) @ jax.random.normal(b_key, (*layers, rank // 2, o), jnp.float32) / 10


def pissa(iterations: int | None = None) -> FromWeight:
    """Start from the principal part of the weight: A = U_r √S_r, B = √S_r V_rᵀ with W = U S Vᵀ.

    Meng et al. 2024, arXiv:2404.02948, equations 2 and 3. With `iterations` the decomposition is randomised (Halko et al. 2011,
    arXiv:0909.4061, algorithm 5.1 after that many power iterations, oversampled by as many columns as r): PEFT's `pissa_niter_N`.
    """

    def factors(key: jax.Array, weight: jax.Array, rank: int) -> Factors:
        u, s, vt = jnp.linalg.svd(weight, full_matrices=False) if iterations is None else _randomised_svd(key, weight, rank, iterations)
        root = jnp.sqrt(s[..., :rank])
        return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]

    return FromWeight(factors)


def _randomised_svd(key: jax.Array, weight: jax.Array, rank: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    *layers, i, o = weight.shape
    columns = min(2 * rank, i, o)
    y = weight @ jax.random.normal(key, (*layers, o, columns), jnp.float32)
    for _ in range(iterations):  # orthogonal in between, or the small singular values would drown in rounding
        y = jnp.linalg.qr(y)[0]
        y = weight @ jnp.linalg.qr(jnp.swapaxes(weight, -1, -2) @ y)[0]
    basis = jnp.linalg.qr(y)[0]
    u, s, vt = jnp.linalg.svd(jnp.swapaxes(basis, -1, -2) @ weight, full_matrices=False)
    return basis @ u, s, vt


def olora() -> FromWeight:
    """Start from an orthonormal basis: A = R_rᵀ, B = Q_rᵀ with Wᵀ = Q R (Büyükakyüz 2024, arXiv:2406.01775, algorithm 1)."""

    def factors(key: jax.Array, weight: jax.Array, rank: int) -> Factors:
        del key
        q, r = jnp.linalg.qr(jnp.swapaxes(weight, -1, -2))
        return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)

    return FromWeight(factors)


INITS: dict[str, Init] = {"uniform": uniform, "gaussian": gaussian, "a_zero": a_zero, "orthogonal": orthogonal}
FROM_WEIGHT: dict[str, Callable[[], FromWeight]] = {
    "pissa": pissa,
    "pissa_niter_4": functools.partial(pissa, 4),
    "pissa_niter_16": functools.partial(pissa, 16),
    "olora": olora,
}


def named(init: Init | FromWeight | str, who: str) -> Init | FromWeight:
    """Return what `init` names among `INITS` and `FROM_WEIGHT`, or `init` itself."""
    if not isinstance(init, str):
        return init
    if init in FROM_WEIGHT:
        return FROM_WEIGHT[init]()
    if init not in INITS:
        raise ValueError(f"{who}: there is no init {init!r}; nearest: {tree.nearest(init, [*INITS, *FROM_WEIGHT])}.")
    return INITS[init]


def blind(init: Init | str, who: str) -> Init:
    """Return the init; one that reads the weight is refused."""
    found = named(init, who)
    if isinstance(found, FromWeight):
        raise ValueError(f"{who}: init {init!r} starts from the weight, which only `lora` can; choose one of {', '.join(INITS)}.")
    return found
