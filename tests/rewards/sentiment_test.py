import math

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.sentiment import lexicon, polarity, sentiment


@pytest.mark.parametrize(
    "text, value",
    [
        ("A wonderful film, and well acted.", 2.0),
        ("It is not good.", -1.0),
        ("I didn't really enjoy it", -1.5),
        ("Not at all. Good!", 1.0),
        ("nothing in it was bad", -1.0),
        ("very GOOD, very bad", 0.0),
        ("The cat sat.", 0.0),
        ("", 0.0),
    ],
)
def test_polarity(text, value):
    assert polarity(text) == value


def test_sentiment_is_the_normalisation_of_vader_with_a_sign():
    assert sentiment([], ["good good", "bad", "-"]) == pytest.approx([2 / math.sqrt(4 + 15), -1 / 4, 0.0])
    assert sentiment([], ["good", "bad"], sign=-1.0) == pytest.approx([-0.25, 0.25])


def test_no_word_is_both():
    assert sum(value > 0 for value in lexicon().values()) == 362 and sum(value < 0 for value in lexicon().values()) == 354


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.text())
def test_any_text_has_a_bounded_sentiment(text):
    assert -1.0 < sentiment([], [text])[0] < 1.0
