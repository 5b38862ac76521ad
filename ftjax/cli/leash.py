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

    def follow(self, index: int, kl: np.ndarray) -> Metrics:
        """Take in the divergence of each sample of an experience, `[n]` in nats; return the metrics `kl_coef` and `kl/sampled`.

        Experiences come in their order.
        """
        coef, found = self.coef(index), float(np.mean(kl, dtype=np.float64))
        if self._asked.kl_target:
            after = shaping.adaptive_kl_coef(coef, found, target=self._asked.kl_target, gain=len(kl) / self._asked.kl_horizon)
            self._coefs[str(index + 1)] = float(after)
            for old in [name for name in self._coefs if int(name) < index]:
                del self._coefs[old]
        one = np.float32(1)
        return {"kl_coef": Mean(np.float32(coef), one), "kl/sampled": Mean(np.float32(found), one)}
