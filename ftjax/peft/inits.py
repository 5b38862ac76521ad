"""How a low-rank adapter starts: blind inits make A B = 0; the others start A B as a part of the weight, which is taken off again.

An init of the second kind leaves the base where it is. LoRA keeps what A B was at the start in the frozen tree and computes
x W + s (x A B - x A₀ B₀), which is what PEFT computes with a base W - s A₀ B₀, in value and gradient (but for dropout, which here acts on
both products). So the frozen tree stays the reference policy, its buffers stay shared, and the adapter is, at any time, a plain LoRA of
rank 2r on the published weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.peft import riding

Factors = tuple[jax.Array, jax.Array]
Init = Callable[[jax.Array, tuple[int, ...], int], Factors]
"""`(key, shape [..., i, o], rank) -> (a [..., i, r], b [..., r, o])`, float32, with `a @ b == 0`."""


class FromWeight(NamedTuple):
    """An init that reads the weight."""

    factors: Callable[[jax.Array, jax.Array, int], Factors]
    """`(key, weight float32 [..., i, o], rank) -> (a, b)`: A B is the part of the weight that is trained."""
    divided: bool = True
    """LoRA divides both by √s, so that s A B is that part; False: s A B is taken off as it comes."""


class OfPath(NamedTuple):
    """An init that knows something of each matrix, such as its inputs."""

    at: Callable[[str], Init | FromWeight]
    """The init of a path."""


def uniform(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A ~ U(-1/√i, 1/√i), B = 0: what PEFT does by default (Kaiming uniform with a = √5)."""
    *layers, i, o = shape
    return riding.uniform(key, (*layers, i, rank), i), jnp.zeros((*layers, rank, o), jnp.float32)


def gaussian(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A ~ N(0, 1/r²), B = 0: PEFT's `init_lora_weights="gaussian"`."""
    *layers, i, o = shape
    return jax.random.normal(key, (*layers, i, rank), jnp.float32) / rank, jnp.zeros((*layers, rank, o), jnp.float32)


def a_zero(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
    """A = 0, B ~ U(-1/√r, 1/√r): the first Adam step then does not hang on the sign of tiny gradients of B."""
    *layers, i, o = shape
    return jnp.zeros((*layers, i, rank), jnp.float32), riding.uniform(key, (*layers, rank, o), rank)


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
    """Start from an orthonormal basis: A = R_rᵀ, B = Q_rᵀ with Wᵀ = Q R (Büyükakyüz 2024, arXiv:2406.01775)."""

    def factors(key: jax.Array, weight: jax.Array, rank: int) -> Factors:
        del key
        q, r = jnp.linalg.qr(jnp.swapaxes(weight, -1, -2))
        return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)

    return FromWeight(factors)


def eva(moments: Mapping[str, jax.Array], *, rho: float = 1.0) -> OfPath:
    """Start A as the main directions of the matrix's own inputs, and B = 0; the directions go where they explain most.

    Paischer et al. 2024, arXiv:2410.07170: the columns of A are the first right singular vectors of the inputs X `[tokens, i]`, which are
    the eigenvectors of Xᵀ X. Direction j explains the share λ_j / Σ λ of its matrix's inputs. With ρ > 1 only those directions start so
    that are among the n r / ρ that explain most, over all n matrices. The other columns, and their rows of B, are zero and get no
    gradient, so they are never trained: the matrix has the lower rank.

    Where we differ: the r of the paper is rank / ρ here, because the layers of a stacked leaf have one shape. A run so has the time and the
    memory of `rank`; the scale is that of `rank` in all, where PEFT sets alpha so that it is that of its r. With other ranks in a
    `rank_pattern`, each matrix is judged as if all had its own.

    Args:
      moments: from `ftjax.peft.calibration.input_moments`, of the same targets.
      rho: ρ ≥ 1, the most directions of a matrix over the mean. At 1 each has all of its rank; the paper and PEFT have 2.
    """
    if not rho >= 1:
        raise ValueError(f"inits: the rho of eva is at least 1, not {rho}.")

    @functools.cache
    def main(path: str, rank: int) -> Factors:
        """Return the shares that the first directions explain `[..., r]`, falling, and the directions `[..., i, r]`."""
        moment = _known(moments, path, "eva")
        with jax.ensure_compile_time_eval():  # else one trace would remember another's tracers
            values, vectors = (found[..., ::-1][..., :rank] for found in jnp.linalg.eigh(moment))  # of those in ascending order
            return values / jnp.trace(moment, axis1=-2, axis2=-1)[..., None], vectors

    def at(path: str) -> Init:
        def factors(key: jax.Array, shape: tuple[int, ...], rank: int) -> Factors:
            del key
            explained, vectors = main(path, rank)
            *layers, i, o = shape
            if rho > 1:
                everywhere = jnp.sort(jnp.concatenate([main(each, rank)[0].ravel() for each in moments]))
                least = everywhere[-max(int(everywhere.size / rho), 1)]
                vectors = jnp.where((explained >= least)[..., None, :], vectors, 0.0)
            return vectors, jnp.zeros((*layers, rank, o), jnp.float32)

        return factors

    return OfPath(at)


def corda(moments: Mapping[str, jax.Array], *, keep: str = "task") -> OfPath:
    """Start from the part of the weight that matters most, or least, to the inputs: A = C⁻¹ U √S, B = √S Vᵀ with C W = U S Vᵀ.

    Yang et al. 2024, arXiv:2406.05223, C the second moment of the inputs.

    Args:
      moments: from `ftjax.peft.calibration.input_moments`: on the new task's text for "task", on text that must not be forgotten for
        "knowledge".
      keep: "task" trains the r directions with the largest singular values (the paper's instruction-previewed mode), "knowledge" those with
        the smallest (knowledge-preserved).
    """
    if keep not in ("task", "knowledge"):
        raise ValueError(f"inits: corda keeps 'task' or 'knowledge', not {keep!r}.")

    def at(path: str) -> FromWeight:
        def factors(key: jax.Array, weight: jax.Array, rank: int) -> Factors:
            del key
            moment = _known(moments, path, "corda")
            size = moment.shape[-1]
            mean = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / size
            c = moment / mean + jnp.broadcast_to(
                0.01 * jnp.eye(size), moment.shape
            )  # of unit scale, and with an inverse; PEFT adds as much
            u, s, vt = jnp.linalg.svd(c @ weight, full_matrices=False)
            chosen = slice(None, rank) if keep == "task" else slice(s.shape[-1] - rank, None)
            root = jnp.sqrt(s[..., chosen])
            return jnp.linalg.solve(c, u[..., chosen] * root[..., None, :]), root[..., :, None] * vt[..., chosen, :]

        return FromWeight(factors)

    return OfPath(at)


def lora_ga(gradients: Mapping[str, jax.Array], *, gamma: float = 16.0) -> OfPath:
    """Start along the weight's own gradient, so that the first step is near that of full fine-tuning.

    A = U_r, B = (o^¼ / √γ) S_{r..2r} V_{r..2r}ᵀ with dL/dW = U S Vᵀ: Wang et al. 2024, arXiv:2407.05000, in the form that PEFT
    has as direction "ArB2r" and scale "stable" (the paper's B has no S). Needs matrices with at least 2 r columns and rows.

    Args:
      gradients: from `ftjax.peft.calibration.weight_gradients`.
      gamma: γ > 0, larger for a smaller start.
    """
    if not gamma > 0:
        raise ValueError(f"inits: the gamma of lora_ga is above 0, not {gamma}.")

    def at(path: str) -> FromWeight:
        def factors(key: jax.Array, weight: jax.Array, rank: int) -> Factors:
            del key
            gradient = _known(gradients, path, "lora_ga")
            if 2 * rank > min(weight.shape[-2:]):
                raise ValueError(f"inits: lora_ga takes 2 · {rank} directions, and {path} {list(weight.shape)} has fewer.")
            u, s, vt = jnp.linalg.svd(gradient, full_matrices=False)
            size = weight.shape[-1] ** 0.25 / gamma**0.5
            return u[..., :rank], size * s[..., rank : 2 * rank, None] * vt[..., rank : 2 * rank, :]

        return FromWeight(factors, divided=False)

    return OfPath(at)


def _known(statistics: Mapping[str, jax.Array], path: str, who: str) -> jax.Array:
    if path not in statistics:
        raise ValueError(
            f"inits: {who} knows nothing of {path!r}; nearest: {tree.nearest(path, statistics)}. Calibrate the same targets: "
            "see ftjax.peft.calibration (ftjax train does so by itself)."
        )
    return statistics[path]


INITS: dict[str, Init] = {"uniform": uniform, "gaussian": gaussian, "a_zero": a_zero, "orthogonal": orthogonal}
FROM_WEIGHT: dict[str, Callable[[], FromWeight]] = {"pissa": pissa, "olora": olora}
"""And `pissa_niter_N`, which is `pissa(N)`."""
CALIBRATED: dict[str, Callable[..., OfPath]] = {"eva": eva, "corda": corda, "lora_ga": lora_ga}
"""Each takes what `ftjax.peft.calibration` finds. By its name alone one can be planned and attached, but not started from."""


def named(init: Init | FromWeight | OfPath | str, who: str) -> Init | FromWeight | OfPath:
    """Return what `init` names among `INITS`, `FROM_WEIGHT` (`pissa_niter_N` too) and `CALIBRATED`, or `init` itself."""
    if not isinstance(init, str):
        return init
    if init in FROM_WEIGHT:
        return FROM_WEIGHT[init]()
    if randomised := re.fullmatch(r"pissa_niter_(\d+)", init):
        return pissa(int(randomised[1]))
    if init in CALIBRATED:
        return CALIBRATED[init]({})
    if init not in INITS:
        known = [*INITS, *FROM_WEIGHT, "pissa_niter_4", *CALIBRATED]
        raise ValueError(f"{who}: there is no init {init!r}; nearest: {tree.nearest(init, known)}.")
    return INITS[init]


def at(init: Init | FromWeight | OfPath, path: str) -> Init | FromWeight:
    """Return the init of one path."""
    return init.at(path) if isinstance(init, OfPath) else init


def blind(init: Init | str, who: str) -> Init:
    """Return the init; one that reads the weight is refused."""
    found = named(init, who)
    if isinstance(found, (FromWeight, OfPath)):
        raise ValueError(
            f"{who}: init {init!r} starts from the weight or from data, which only `lora` can; choose one of {', '.join(INITS)}."
        )
    return found
