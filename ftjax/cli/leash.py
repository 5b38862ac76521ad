"""How dear it is to leave the reference: a fixed penalty, or one that follows the divergence to a target."""

from __future__ import annotations

import numpy as np

from ftjax.losses import shaping
from ftjax.types import Mean, Metrics


class Leash:
    """The coefficient of the KL penalty by experience: `rollout.kl_penalty`, which adapts where there is a `rollout.kl_target`.

    c' = c (1 + n / horizon · clip(KL / target - 1, -0.2, 0.2)), after an experience of n samples that left the reference by KL nats on
    average: Ziegler et al., 2019, arXiv 1909.08593, section 2.2.

    What is known of coefficients is kept where a checkpoint finds it: those of the next experiences to come, so that a run that goes on
    samples none of them with another.
    """

    def __init__(self, config, coefs: dict[str, float]):
        self._asked, self._coefs = config.rollout, coefs

    def coef(self, index: int) -> float:
        """Return the coefficient of an experience."""
        return self._coefs.get(str(index), self._asked.kl_penalty)

    def follow(self, index: int, kl: np.ndarray, counted: np.ndarray) -> Metrics:
        """Take in an experience; return the metrics `kl_coef` and `kl/sampled`.

        Args:
          index: of the experience; they come in their order.
          kl: `[n]`, the divergence of each sample in nats.
          counted: bool `[n]`, of which samples tokens count: the others say nothing of it, and if all are such, nothing changes.
        """
        coef, count = self.coef(index), int(counted.sum())
        total = float(np.sum(kl[counted], dtype=np.float64))
        if self._asked.kl_target:
            gain, kl_mean = count / self._asked.kl_horizon, total / max(count, 1)
            self._coefs[str(index + 1)] = float(shaping.adaptive_kl_coef(coef, kl_mean, target=self._asked.kl_target, gain=gain))
            for old in [name for name in self._coefs if int(name) < index]:
                del self._coefs[old]
        return {"kl_coef": Mean(np.float32(coef), np.float32(1)), "kl/sampled": Mean(np.float32(total), np.float32(count))}
