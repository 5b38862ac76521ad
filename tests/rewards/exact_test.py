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


def test_as_many_answers_as_completions():
    with pytest.raises(ValueError):
        exact_match(["Q"], ["a", "b"], answer=["a"])
