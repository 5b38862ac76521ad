import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.repetition import repetition


def test_repetition_is_that_of_trl():
    """TRL's example: 4 bigrams of 5 5 5 5 5, one unique: 1 - 1/4. Of 1 2 1 2 1: two of four."""
    found = repetition([], [], completion_ids=[[1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1], [1], []], ngram_tokens=2)
    assert found == [0.0, -0.75, -0.5, 0.0, 0.0]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(0, 3)), st.integers(1, 5))
def test_the_penalty_is_bounded_and_saying_it_twice_is_never_better(ids, n):
    once, twice = repetition([], [], completion_ids=[ids, ids + ids], ngram_tokens=n, max_penalty=-2.0)
    assert -2.0 < twice <= 0.0 and (twice <= once + 1e-12 or len(ids) < n)


@pytest.mark.parametrize("options", [{"max_penalty": 0.1}, {"ngram_tokens": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="max_penalty is at most 0"):
        repetition([], [], completion_ids=[], **options)
