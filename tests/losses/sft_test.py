import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import sft
from ftjax.types import Batch, Scores

TOKENS = jnp.zeros((2, 3), jnp.int32)
MASK = jnp.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
BATCH = Batch(TOKENS, MASK, TOKENS, TOKENS + 1)
LOGPS = jnp.array([[0.0, -1.0, -3.0], [0.0, 0.0, -2.0]])


def test_the_mean_is_over_tokens_not_rows():
    """Three supervised tokens: (1 + 3 + 2) / 3 = 2; a mean of row means would be ((1 + 3) / 2 + 2) / 2 = 2 too, so row 1 is made to differ.

    With log-probabilities -1, -3 and -5: tokens give (1 + 3 + 5) / 3 = 3, rows would give (2 + 5) / 2 = 3.5.
    """
    loss, metrics = sft(Scores(LOGPS.at[1, 2].set(-5.0)), BATCH)
    assert loss.value() == pytest.approx(3.0) and metrics["nll"].value() == pytest.approx(3.0)
    assert float(loss.weight) == 3


def test_label_smoothing_by_hand():
    """ε = 0.2, one token of each pair: 0.8 · 2 + 0.2 · 4 = 2.4 in the mean, for a mean nll of 2 and a mean of mean_logps of -4."""
    loss, metrics = sft(Scores(LOGPS, mean_logps=jnp.full((2, 3), -4.0)), BATCH, label_smoothing=0.2)
    assert loss.value() == pytest.approx(0.8 * 2 + 0.2 * 4)
    assert metrics["nll"].value() == pytest.approx(2.0)


def test_accuracy_and_entropy_count_supervised_tokens_only():
    scores = Scores(LOGPS, greedy=jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]), entropy=jnp.full((2, 3), 0.5))
    _, metrics = sft(scores, BATCH)
    np.testing.assert_allclose([metrics["accuracy"].value(), metrics["entropy"].value()], [1 / 3, 0.5])


def test_smoothing_without_its_scores_says_how_to_get_them():
    with pytest.raises(ValueError, match="mean_logps"):
        sft(Scores(LOGPS), BATCH, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sft(Scores(LOGPS), BATCH, label_smoothing=1.0)
