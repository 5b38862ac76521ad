import math

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.length import brevity, cosine, soft_overlong, target_length


def ids(*counts):
    return [[7] * n for n in counts]


def test_soft_overlong_is_equation_13_of_dapo():
    """L_max 100, L_cache 20: 0 to 80, then -(n - 80) / 20, then -1."""
    found = soft_overlong([], [], completion_ids=ids(0, 80, 81, 90, 100, 101, 10**4), max_tokens=100, soft_tokens=20)
    assert found == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]


def test_soft_overlong_without_a_slope_is_a_cliff():
    assert soft_overlong([], [], completion_ids=ids(100, 101), max_tokens=100, soft_tokens=0) == [0.0, -1.0]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 200))
def test_soft_overlong_never_rewards_length(count, most, soft):
    hypothesis.assume(soft <= most)
    shorter, longer = soft_overlong([], [], completion_ids=ids(count, count + 1), max_tokens=most, soft_tokens=soft)
    assert 0.0 >= shorter >= longer >= -1.0


def test_cosine_is_that_of_trl():
    """TRL's example: half of max_len gives 0.75 and -0.75; the ends are the bounds, and beyond max_len nothing changes."""
    counts, answers = (50, 50, 0, 0, 100, 100, 150, 25), ["y", "n", "y", "n", "y", "n", "y", "y"]
    found = cosine([""] * 8, ["y"] * 8, completion_ids=ids(*counts), max_tokens=100, answer=answers)
    quarter = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi / 4))
    assert found == pytest.approx([0.75, -0.75, 1.0, -1.0, 0.5, -0.5, 0.5, quarter])


def test_cosine_and_brevity_do_not_apply_where_right_is_unknown():
    columns = {"completion_ids": ids(1, 2), "answer": [None, "y"]}
    assert cosine(["", ""], ["y", "y"], max_tokens=9, **columns)[0] is None
    assert brevity(["", ""], ["y", "y"], **columns) == [None, -0.5]


def test_brevity_compares_the_answers_to_one_prompt():
    """Lengths 10, 20, 30: λ = .5, 0, -.5, and a wrong answer gets at most 0; the lone answer to another prompt gets 0."""
    prompts, completion_ids = ["p", "p", "p", "p", "q"], ids(10, 20, 30, 10, 500)
    assert brevity(prompts, ["y", "y", "y", "n", "y"], completion_ids=completion_ids, answer=["y"] * 5) == [0.5, 0.0, -0.5, 0.0, 0.0]


def test_target_length():
    assert target_length([], [], completion_ids=ids(100, 150, 50, 0, 900), target_tokens=100) == [0.0, -0.5, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    "reward, options",
    [
        (soft_overlong, {"max_tokens": 0, "soft_tokens": 0}),
        (soft_overlong, {"max_tokens": 5, "soft_tokens": 6}),
        (target_length, {"target_tokens": 0}),
    ],
)
def test_impossible_lengths_are_refused(reward, options):
    with pytest.raises(ValueError, match=reward.__name__):
        reward([], [], completion_ids=[], **options)
