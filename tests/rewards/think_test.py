import re

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.think import block, tag_count, tag_format, think_format

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "a", "é", "</think", "<think >"])).map(
    "".join
)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(PIECES)
def test_think_format_is_the_pattern_of_trl(text):
    theirs = re.match(r"^<think>(?!.*<think>)(.*?)</think>.*$", text, re.DOTALL | re.MULTILINE)
    assert think_format([""], [text]) == [float(theirs is not None)]
    assert think_format([""], [text], opened=True) == think_format([""], ["<think>" + text])


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(PIECES)
def test_tag_count_is_that_of_open_r1(text):
    marks = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    assert tag_count([""], [text]) == [sum(0.25 for mark in marks if text.count(mark) == 1)]


@pytest.mark.parametrize(
    "text, score",
    [
        ("<think>\nwhy\n</think>\n<answer>\n5\n</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        (" <think>a</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a</think><answer>b</answer> and more", 0.0),
        ("well <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</think></answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("</think><think></think><answer></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tag_format_wants_each_block_once_and_in_order(text, score):
    assert tag_format([""], [text]) == [score]


def test_other_tags():
    assert tag_format([""], ["<plan>a</plan>"], tags=("plan",)) == [1.0]
    assert tag_count([""], ["<plan>\na\n</plan>"], tags=("plan",)) == [1.0]


@pytest.mark.parametrize("text, inside", [("<a>1</a><a> 2 </a>", "2"), ("<a>1", None), ("</a><a>", None), ("<a></a>", ""), ("", None)])
def test_the_last_closed_block(text, inside):
    assert block(text, "a") == inside
