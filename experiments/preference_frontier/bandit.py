"""A bandit whose best policies are known: contexts, arms with rewards, a reference policy, and a table of logits that is trained.

A response is one token, the arm, after a prompt of one token, the context. So `ftjax.losses` and `train.make_train_step` see what they see
of a language model, and nothing stands between an objective and its optimum. Arrays of policies are log-probabilities `[contexts, arms]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.types import Batch, Params, Scores

INVERSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reverse_kl": np.exp,
    "forward_kl": lambda y: 1 / np.maximum(1 - y, 0),
    "js": lambda y: 1 / np.maximum(2 * np.exp(-y) - 1, 0),
    "alpha": lambda y: np.maximum(1 - y / 2, 0) ** -2,
}
"""Of f' in `losses.divergences`: the ratio π / π_ref at which f' is y; infinite above the largest value that f' has."""


class Bandit(NamedTuple):
    """What is to be learnt, `[contexts, arms]` each."""

    rewards: np.ndarray
    reference: np.ndarray
    """Log-probabilities."""

    @property
    def preferences(self) -> np.ndarray:
        """Bradley–Terry's: the probability that arm i is preferred to arm j, `[contexts, i, j]`."""
        return 1 / (1 + np.exp(self.rewards[:, None, :] - self.rewards[:, :, None]))

    def optimum(self, beta: float, divergence: str = "reverse_kl") -> np.ndarray:
        """Return the policy that maximises E[r] - β D(π ‖ π_ref): for the reverse KL π ∝ π_ref exp(r/β).

        In general π = π_ref · (f')⁻¹(r/β - λ), with λ such that the probabilities sum to 1, which is found by bisection.
        """
        scaled = self.rewards / beta
        low, high = (np.max(scaled, axis=1, keepdims=True) + shift for shift in (-50.0, 1000.0))
        ratio = lambda level: INVERSES[divergence](scaled - level)  # noqa: E731
        with np.errstate(divide="ignore"):
            for _ in range(100):
                middle = (low + high) / 2
                above = np.sum(np.exp(self.reference) * ratio(middle), axis=1, keepdims=True) > 1
                low, high = np.where(above, middle, low), np.where(above, high, middle)
            return self.reference + np.log(ratio(high))

    def best_of(self, number: int, judged: np.ndarray | None = None) -> np.ndarray:
        """Return what is played where the reference proposes so many arms and the best judged is taken (by the true rewards if None)."""
        judged = self.rewards if judged is None else judged
        order = np.argsort(judged, axis=1)
        below = np.cumsum(np.take_along_axis(np.exp(self.reference), order, 1), axis=1)
        chosen = np.diff(below**number, axis=1, prepend=0)
        with np.errstate(divide="ignore"):
            return np.log(np.take_along_axis(chosen, np.argsort(order, axis=1), 1))

    def reward(self, policy: np.ndarray) -> float:
        """Return E[r], over contexts alike."""
        return float(np.mean(np.sum(np.exp(policy) * self.rewards, axis=1)))

    def kl(self, policy: np.ndarray) -> float:
        """Return KL(π ‖ π_ref) in nats, over contexts alike."""
        logratio = np.where(policy > -np.inf, policy, 0) - self.reference  # what is never played has no part in the sum
        return float(np.mean(np.sum(np.exp(policy) * logratio, axis=1)))


def total_variation(policy: np.ndarray, other: np.ndarray) -> float:
    """Return ½ Σ |π - π'| of the context where it is largest."""
    return float(np.max(np.sum(np.abs(np.exp(policy) - np.exp(other)), axis=1)) / 2)


def batch(bandit: Bandit, contexts: jax.Array, arms: jax.Array, **fields) -> Batch:
    """Return contexts and arms `[*b]` as a batch of two tokens, with what the reference says of them."""
    tokens = jnp.stack([contexts, arms], axis=-1).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(2).reshape((1,) * contexts.ndim + (2,)), tokens.shape)
    reference = of_arms(jnp.asarray(bandit.reference, jnp.float32)[contexts, arms])
    return Batch(tokens, positions.astype(jnp.float32), positions, jnp.ones_like(positions), reference_logps=reference, **fields)


def of_arms(values: jax.Array) -> jax.Array:
    """Return values of arms `[*b]` as those of tokens `[*b, 2]`, of which the first is the context."""
    return jnp.stack([jnp.zeros_like(values), values], axis=-1)


def singles(scores: Scores, pairs: Batch) -> tuple[Scores, Batch]:
    """Return the responses of pairs `[b, 2, t]` one by one: the chosen ones are desirable and the others are not."""
    rows = lambda x: x if x is None else x.reshape(-1, x.shape[-1])  # noqa: E731
    desirable = jnp.tile(jnp.array([1.0, 0.0]), pairs.tokens.shape[0])
    return jax.tree.map(rows, scores), dataclasses.replace(jax.tree.map(rows, pairs), desirable=desirable)


def start(bandit: Bandit) -> Params:
    """Return the table of the reference, and zeros for the values of contexts and of arms."""
    logits = jnp.asarray(bandit.reference, jnp.float32)
    return {"policy": {"kernel": logits}, "values": {"contexts": jnp.zeros_like(logits[:, :1]), "arms": jnp.zeros_like(logits)}}


def score(params: Params, batch: Batch) -> Scores:
    """Return what the tables say: as `ftjax.scoring.score` of a language model with a value head, whose values are of the text so far."""
    contexts, arms = batch.tokens[..., 0], batch.tokens[..., 1]
    logps, values = jax.nn.log_softmax(params["policy"]["kernel"]), params["values"]
    return Scores(
        logps=of_arms(logps[contexts, arms]),
        values=jnp.stack([values["contexts"][contexts, 0], values["arms"][contexts, arms]], axis=-1),
    )


def policy(params: Params) -> np.ndarray:
    """Return the log-probabilities of a table, in float64."""
    logits = np.asarray(params["policy"]["kernel"], np.float64)
    return logits - np.log(np.sum(np.exp(logits - logits.max(1, keepdims=True)), 1, keepdims=True)) - logits.max(1, keepdims=True)
