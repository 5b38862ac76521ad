import time
from decimal import Decimal

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards import numeric_match
from ftjax.rewards.numeric import final_number


@pytest.mark.parametrize(
    "text, number",
    [
        ("She sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("#### -1,000 and then 5", "-1000"),
        ("so 5-3 = 2", "2"),
        ("it is 3 - 4", "4"),
        ("The answer is -3.", "-3"),
        ("The answer is 7, not 8", "7"),
        ("x = −7", "-7"),
        ("(-3)", "-3"),
        ("$1,234.50", "1234.5"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        ("25%", "25"),
        ("18.", "18"),
        ("a .5 b", "0.5"),
        ("12,345,678", "12345678"),
        ("1,2,3", "3"),
        ("7.0", "7"),
        ("2024-05-06", "6"),
        ("none", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.decimals(allow_nan=False, allow_infinity=False, places=2),
    st.sampled_from(["{:f}", "{:,f}", "so $x$ is {:,f}.", "${:f}", "#### {:f}\n7"]),
)
def test_any_number_is_read_as_written(number, form):
    assert final_number(form.format(number)) == number


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.text(alphabet=st.one_of(st.sampled_from("0123456789,.-−$€ #answer()%²٣"), st.characters())))
def test_any_text_has_a_number_or_none(text):
    assert final_number(text) is None or final_number(text).is_finite()


@pytest.mark.parametrize("part", ["9", "1,", ",111", "-", "answer ", "#### ", "$ ", " ", "1.", "٣"])
def test_reading_takes_time_in_proportion(part):
    start = time.process_time()
    final_number(part * (200_000 // len(part)))
    assert time.process_time() - start < 1.0


def test_numeric_match_compares_values_and_not_their_spelling():
    completions = ["so 72.0", "#### 71", "no idea", "5"]
    assert numeric_match([""] * 4, completions, answer=["… #### 72", "#### 72", 72, "none"]) == [1.0, 0.0, 0.0, None]
