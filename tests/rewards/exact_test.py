import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards import exact_match


@pytest.mark.parametrize(
    "completion, answer, score",
    [
        ("7, 23", "7, 23", 1.0),
        (" 7,  23\n", "7, 23", 1.0),
        ("7, 23.", "7, 23", 1.0),
        ("7,23", "7, 23", 0.0),
        ("The answer is 7, 23", "7, 23", 0.0),
        ("ﬁne", "fine", 1.0),
        ("Fine", "fine", 0.0),
        ("", "7", 0.0),
        ("7..", "7", 0.0),
        ("7", None, None),
    ],
)
def test_exact_match(completion, answer, score):
    assert exact_match(["Q"], [completion], answer=[answer], task=["sort"]) == [score]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.text(), st.text(alphabet=" \n\t"))
def test_any_text_is_its_own_answer_whatever_stands_around_it(text, blanks):
    assert exact_match(["Q"], [blanks + text + blanks], answer=[text]) == [1.0]


def test_as_many_answers_as_completions():
    with pytest.raises(ValueError):
        exact_match(["Q"], ["a", "b"], answer=["a"])
