"""Distillation: divergences of a student from its teacher, token by token, and the loss that averages them.

The divergences read the logits of one token, the student's and the teacher's; `scoring.score_against` takes one and writes
`Scores.divergence` without holding the logits. S and T are the two distributions at a temperature.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def distill(scores: Scores, batch: Batch, *, divergence_coef: float = 1.0, nll_coef: float = 0.0) -> tuple[Mean, Metrics]:
    """Return c_d · divergence + c_n · NLL, a mean over tokens.

    The soft and the hard targets of Hinton, Vinyals and Dean, 2015, arXiv 1503.02531, which scales the soft ones by the squared temperature
    so that the two keep their balance: so does c_d here, if you want it. A token without a partner in the teacher's text has the divergence
    0 and counts.

    Args:
      scores: of the student, with `divergence` from `scoring.score_against`.
      batch: its `loss_mask` says which tokens count.
      divergence_coef: c_d.
      nll_coef: c_n, of the negative log-likelihood of the text itself.

    Returns:
      The loss, and the metrics `divergence`, `nll`, and `agreement`, `accuracy` and `entropy` where scored.

    Raises:
      ValueError: the divergence was not scored.

    Example:
      >>> mask = jnp.ones((1, 2))
      >>> batch = Batch(mask.astype(int), mask, mask.astype(int), mask.astype(int))
      >>> loss, _ = distill(Scores(logps=-mask, divergence=jnp.array([[0.5, 1.5]])), batch, nll_coef=2.0)
      >>> loss.value()
      3.0
    """
    if scores.divergence is None:
        raise ValueError("distill: scores.divergence is missing: score with scoring.score_against(model, teacher, …).")
    mask = batch.loss_mask
    metrics = {"divergence": masked_mean(scores.divergence, mask), "nll": masked_mean(-scores.logps, mask)}
    if scores.agreement is not None:
        metrics["agreement"] = masked_mean(scores.agreement, mask)
    if scores.greedy is not None:
        metrics["accuracy"] = masked_mean(scores.greedy, mask)
    if scores.entropy is not None:
        metrics["entropy"] = masked_mean(scores.entropy, mask)
    loss = masked_mean(divergence_coef * scores.divergence - nll_coef * scores.logps, mask)
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def forward_kl(student: Float[Array, "*b v"], teacher: Float[Array, "*b v"], *, temperature: float = 1.0) -> Float[Array, "*b"]:
    """Return KL(T ‖ S): the student covers whatever the teacher may say. A token that the teacher rules out, by a logit of -∞, adds 0."""
    return _kl(_log_softmax(teacher, temperature), _log_softmax(student, temperature))


def reverse_kl(student: Float[Array, "*b v"], teacher: Float[Array, "*b v"], *, temperature: float = 1.0) -> Float[Array, "*b"]:
    """Return KL(S ‖ T): the student keeps to what the teacher would say; MiniLLM's, Gu et al., 2023, arXiv 2306.08543.

    It is infinite where the teacher rules out, by a logit of -∞, what the student may say: take `jsd` or `forward_kl` of such a teacher.
    """
    return forward_kl(teacher, student, temperature=temperature)


def jsd(student: Float[Array, "*b v"], teacher: Float[Array, "*b v"], *, beta: float = 0.5, temperature: float = 1.0) -> Float[Array, "*b"]:
    """Return β KL(T ‖ M) + (1 - β) KL(S ‖ M), M = β T + (1 - β) S: the generalised Jensen–Shannon divergence, 0 < β < 1.

    Agarwal et al., 2023, arXiv 2306.13649, equation 1. It goes to 0 at both ends; divided by β it is the forward KL at β → 0, by 1 - β the
    reverse KL at β → 1, so those are functions of their own here (TRL and the paper give them the names β = 0 and β = 1).

    Raises:
      ValueError: β is not between 0 and 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"jsd: beta is in (0, 1), not {beta}; the ends are forward_kl and reverse_kl.")
    student, teacher = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    possible = jnp.maximum(student, teacher) > -jnp.inf  # what both rule out is read nowhere, and its gradient would be NaN
    mixture = jnp.logaddexp(jnp.where(possible, teacher, 0) + math.log(beta), jnp.where(possible, student, 0) + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def uld(student: Float[Array, "*b v"], teacher: Float[Array, "*b _"], *, temperature: float = 1.0) -> Float[Array, "*b"]:
    """Return Σ_n | S_(n) - T_(n) | of the probabilities in falling order, the shorter vocabulary filled up with zeros.

    Universal logit distillation, Boizard et al., 2024, arXiv 2402.12030: it asks for no common vocabulary.
    """
    student, teacher = (jnp.sort(jax.nn.softmax(x / temperature), axis=-1, descending=True) for x in (student, teacher))
    size = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in (student, teacher))
    return jnp.sum(jnp.abs(student - teacher), axis=-1)


def stored_kl(student: Float[Array, "*b v"], ids: Int[Array, "*b k"], logps: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """Return KL(T ‖ S) from the teacher's k most likely tokens: the rest of the vocabulary is one outcome in both.

    Σ_k T_k log T_k / S_k + T_rest log T_rest / S_rest, a lower bound of `forward_kl` that is 0 where S is T.

    Args:
      student: logits.
      ids: different ones.
      logps: what the teacher says of them.
    """
    found = jnp.take_along_axis(_log_softmax(student, 1.0), ids, axis=-1)
    rest_of = lambda x: jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(x), axis=-1), REST))  # noqa: E731
    rest = rest_of(logps)
    return _kl(logps, found) + jnp.exp(rest) * (rest - rest_of(found))


REST = 1e-6
"""The least probability of the rest of the vocabulary: rounding may leave less than nothing."""
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "uld": uld}


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return Σ p (log p - log q), where what p rules out adds 0, in the gradient too: there 0 · ∞ would be NaN."""
    possible = jnp.exp(log_p) > 0
    log_p, log_q = (jnp.where(possible, x, 0) for x in (log_p, log_q))
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * (log_p - log_q), 0), axis=-1)
