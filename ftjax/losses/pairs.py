"""Losses of a pair: small functions of what the policy has gained on a chosen and on a rejected response.

Each takes `Pairs` and β and returns one loss a pair; `losses.preference` sums, weighs and averages them. x_c and x_r are the log-ratios
log π(y|x) / π_ref(y|x) of the chosen and the rejected response, Δ = x_c - x_r, σ the logistic function, and ε the probability that a
label is wrong. Where there is no reference, x is the log-probability itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Pairs(NamedTuple):
    """What is known of each pair."""

    chosen: Float[Array, " b"]
    """The log-ratio x_c of the chosen response, summed over its tokens."""
    rejected: Float[Array, " b"]
    """The log-ratio x_r of the rejected response."""
    chosen_length: Float[Array, " b"]
    """Its tokens, at least 1."""
    rejected_length: Float[Array, " b"]
    policy: Float[Array, " b"]
    """log π(y_c) - log π(y_r)."""
    reference: Float[Array, " b"]
    """log π_ref(y_c) - log π_ref(y_r)."""
    counted: Float[Array, " b"]
    """1 where both responses have tokens, 0 for a row that only fills the batch."""

    @property
    def delta(self) -> Float[Array, " b"]:
        return self.chosen - self.rejected

    @property
    def average_delta(self) -> Float[Array, " b"]:
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length


PairLoss = Callable[..., Float[Array, " b"]]


def cross_entropy(logits: Float[Array, " b"], label_smoothing: float) -> Float[Array, " b"]:
    """Return -(1-ε) log σ(x) - ε log σ(-x)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    """Return -(1-ε) log σ(βΔ) - ε log σ(-βΔ): DPO, and cDPO where ε > 0.

    Rafailov et al., 2023, arXiv 2305.18290, equation 7; smoothing: Mitchell, 2023, "A note on DPO with noisy preferences". TRL 1.16 takes
    ε and ignores it here.
    """
    return cross_entropy(beta * pairs.delta, label_smoothing)


def sigmoid_norm(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    """Return DPO's loss of the log-ratios *per token*: length-normalised DPO, as in Tülu 3 (Lambert et al., 2024, arXiv 2411.15124)."""
    return cross_entropy(beta * pairs.average_delta, label_smoothing)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float = 0.1) -> Float[Array, " b"]:
    """Return [-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε): an unbiased estimate of DPO's loss where labels flip with probability ε.

    Chowdhury et al., 2024, arXiv 2403.00409. It has no lower bound for ε > 0.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust: label_smoothing, the share of flipped labels, is in [0, 0.5), not {label_smoothing}.")
    return cross_entropy(beta * pairs.delta, -label_smoothing / (1 - 2 * label_smoothing))


def hinge(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return max(0, 1 - βΔ): SLiC (Zhao et al., 2023, arXiv 2305.10425) as RSO writes it (Liu et al., 2023, arXiv 2309.06657)."""
    return jax.nn.relu(1 - beta * pairs.delta)


def ipo(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return (Δ' - 1/2β)², Δ' of the log-ratios per token.

    Azar et al., 2023, arXiv 2310.12036, equation 17, where β is called τ. The paper writes sums, which `ipo_sum` has; its authors ran
    averages, as TRL does: with sums the target 1/2β means another thing for every length.
    """
    return jnp.square(pairs.average_delta - 1 / (2 * beta))


def ipo_sum(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return (Δ - 1/2β)²: IPO as its paper writes it, of the log-ratios of whole responses; see `ipo`."""
    return jnp.square(pairs.delta - 1 / (2 * beta))


def exo(pairs: Pairs, *, beta: float, label_smoothing: float = 1e-3) -> Float[Array, " b"]:
    """Return KL( (σ(βΔ), σ(-βΔ)) ‖ (1-ε, ε) ): the policy's preference against the label's.

    Ji et al., 2024, arXiv 2402.00856, equation 16. The reverse of cDPO's divergence, which is why ε = 0 has no finite loss.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo: label_smoothing is in (0, 1), not {label_smoothing}: at 0 the divergence is infinite.")
    won, lost = (jax.nn.log_sigmoid(sign * beta * pairs.delta) for sign in (1, -1))
    return jnp.exp(won) * (won - jnp.log1p(-label_smoothing)) + jnp.exp(lost) * (lost - jnp.log(label_smoothing))


def nca(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return -log σ(βx_c) - ½ log σ(-βx_c) - ½ log σ(-βx_r): noise-contrastive alignment, Chen et al., 2024, arXiv 2402.05369."""
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return -jax.nn.log_sigmoid(chosen) - (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)) / 2


def bco_pair(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return -log σ(βx_c) - log σ(-βx_r): two binary classifications, Jung et al., 2024, arXiv 2404.04656, with the shift δ = 0."""
    return -jax.nn.log_sigmoid(beta * pairs.chosen) - jax.nn.log_sigmoid(-beta * pairs.rejected)


def sppo_hard(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return (x_c - 1/2β)² + (x_r + 1/2β)²: SPPO where the chosen response wins with probability 1.

    Wu et al., 2024, arXiv 2405.00675. The paper estimates the probability with a preference model.
    """
    return jnp.square(pairs.chosen - 0.5 / beta) + jnp.square(pairs.rejected + 0.5 / beta)


def aot(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    """Return DPO's loss of sorted margins: δ_i = u_i - v_(i), the i-th smallest margin of the policy against that of the reference.

    Stochastic dominance of the margin log π(y_c) - log π(y_r) over the reference's, by optimal transport in one dimension: Melnyk et al.,
    2024, arXiv 2406.05882. It compares the rows of a batch with each other, on however many devices they are, so it is no sum over
    micro-batches: `accumulation=1`. Policy and reference stand apart in it, so no other divergence has a place for their ratio.
    """
    return cross_entropy(beta * (pairs.policy - _of_equal_rank(pairs.reference, pairs.policy, pairs.counted)), label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    """Return DPO's loss of sorted log-ratios: the i-th smallest of the chosen responses against that of the rejected ones; see `aot`."""
    return cross_entropy(beta * (pairs.chosen - _of_equal_rank(pairs.rejected, pairs.chosen, pairs.counted)), label_smoothing)


def apo_zero(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return 1 - σ(βx_c) + σ(βx_r): for chosen responses that are better than the model's own.

    D'Oosterlinck et al., 2024, arXiv 2408.06266, equation 7.
    """
    return jax.nn.sigmoid(-beta * pairs.chosen) + jax.nn.sigmoid(beta * pairs.rejected)


def apo_down(pairs: Pairs, *, beta: float) -> Float[Array, " b"]:
    """Return σ(βx_c) + 1 - σ(βΔ): for a model that is better than the chosen responses; equation 8 of the same paper."""
    return jax.nn.sigmoid(beta * pairs.chosen) + jax.nn.sigmoid(-beta * pairs.delta)


def discopop(pairs: Pairs, *, beta: float, tau: float = 0.05) -> Float[Array, " b"]:
    """Return (1-m)·(-log σ(βΔ)) + m·e^(-βΔ), m = σ(βΔ/τ): the log-ratio modulated loss that a language model found.

    Lu et al., 2024, arXiv 2406.08414, equation 5. It is not monotone: with the paper's τ a policy that is still its reference is first
    pulled towards the rejected response.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"discopop: tau is in (0, 1], not {tau}: above 1 the exponential outgrows its weight.")
    logits = beta * pairs.delta
    # m·e^-x as one exponential: by themselves the two are 0 and infinity where x is far below 0.
    exponential = jnp.exp(jax.nn.log_sigmoid(logits / tau) - logits)
    return -jax.nn.sigmoid(-logits / tau) * jax.nn.log_sigmoid(logits) + exponential


def _of_equal_rank(values: jax.Array, among: jax.Array, counted: jax.Array) -> jax.Array:
    """Return for each of `among` the one of `values` that has the same rank; rows that do not count come last in both."""
    last = jnp.finfo(values.dtype).max
    values, among = (jnp.where(counted > 0, x, last) for x in (values, among))
    ranks = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(among)))
    return jnp.where(counted > 0, jnp.sort(values)[ranks], 0)


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "exo": exo,
    "nca": nca,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
