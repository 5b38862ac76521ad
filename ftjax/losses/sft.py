"""Supervised fine-tuning: the cross-entropy of the tokens that the mask counts."""

from __future__ import annotations

from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def sft(scores: Scores, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Mean, Metrics]:
    """Return the mean negative log-likelihood per supervised token.

    L = Σ m_t · [ -(1 - ε) log π(y_t) - ε mean_v log π(v) ] / Σ m_t

    Label smoothing is Szegedy et al., 2015, arXiv 1512.00567, section 7. The mean is over all supervised tokens of a step, whatever
    micro-batch, row or device they are on.

    Args:
      scores: of the policy; `mean_logps` is needed where `label_smoothing` is not 0.
      batch: its `loss_mask` says which tokens count.
      label_smoothing: ε in [0, 1): the mass that the target shares out evenly over the vocabulary.

    Returns:
      The loss, and the metrics `nll`, `accuracy` (the target was the most likely token) and `entropy`, the last two where scored.

    Raises:
      ValueError: ε is out of range, or `mean_logps` was not scored.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = jnp.array([[0.0, 1.0, 1.0]])
      >>> batch = Batch(tokens=jnp.zeros((1, 3), int), loss_mask=mask, positions=jnp.arange(3)[None], segment_ids=jnp.ones((1, 3), int))
      >>> loss, _ = sft(Scores(logps=jnp.array([[0.0, -1.0, -2.0]])), batch)
      >>> loss.value()
      1.5
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"sft: label_smoothing is in [0, 1), not {label_smoothing}.")
    mask = batch.loss_mask
    nll = -scores.logps
    target = nll
    if label_smoothing:
        if scores.mean_logps is None:
            raise ValueError("sft: label smoothing needs mean_logps: score with outputs=('logps', 'mean_logps').")
        target = (1 - label_smoothing) * nll - label_smoothing * scores.mean_logps
    metrics = {"nll": masked_mean(nll, mask)}
    if scores.greedy is not None:
        metrics["accuracy"] = masked_mean(scores.greedy, mask)
    if scores.entropy is not None:
        metrics["entropy"] = masked_mean(scores.entropy, mask)
    return masked_mean(target, mask), metrics
