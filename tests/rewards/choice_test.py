import time

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.choice import choice, chosen


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"so \boxed{C}, not (A)", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        ("The answer is (B).", "B"),
        ("Answer: **D**", "D"),
        ("The answer is A. No: the answer is C.", "C"),
        ("the correct option is B because A is wrong", "B"),
        ("I think (A) or (D)", "D"),
        ("B. Paris", "B"),
        ("Let me think.\nC", "C"),
        ("A good question. I do not know", None),
        ("the answer is a dog", None),
        ("Answer: Because", None),
        ("K.", None),
        ("", None),
    ],
)
def test_the_letter_it_settles_on(text, letter):
    assert chosen(text) == letter


@pytest.mark.parametrize("answer", ["B", "(B)", "The answer is B.", 1])
def test_the_right_letter_in_any_form(answer):
    assert choice(["Q"] * 2, ["(B)", "(A)"], answer=[answer] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("answer", ["", None, "maybe", 99, -1])
def test_an_answer_without_a_letter_is_not_judged(answer):
    assert choice(["Q"], ["(B)"], answer=[answer]) == [None]


def test_only_the_choices_there_are_count():
    assert choice(["Q"], ["(C) or (A), I mean (E)"], answer=["C"], letters="ABC") == [0.0]
    assert choice(["Q"], ["(A) or (C), I mean (E)"], answer=["C"], letters="ABC") == [1.0]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.text(alphabet=st.one_of(st.sampled_from("ABC()[]*{}\\ \n.:answer is boxed"), st.characters())))
def test_any_text_is_read_as_a_choice_or_none(text):
    assert chosen(text) in (None, *"ABCDEFGHIJ")


@pytest.mark.parametrize("part", ["answer ", " ", "\n", "*", "(", "answer is ", "\\boxed{ "])
def test_reading_takes_time_in_proportion(part):
    start = time.process_time()
    chosen(part * (200_000 // len(part)))
    assert time.process_time() - start < 1.0
