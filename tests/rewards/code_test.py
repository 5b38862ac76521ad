import json

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.code import Trial, code, plain, program, read_tests, same


def fenced(source):
    return f"Here it is:\n```python\n{source}\n```\n"


@pytest.mark.parametrize(
    "text, source",
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n``` then ```python\nb\n```", "b\n"),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("```python\nnever closed", ""),
        ("print(1)", ""),
        ("", ""),
    ],
)
def test_the_program_is_the_last_closed_block(text, source):
    assert program(text) == source


@pytest.mark.parametrize(
    "test, expected",
    [
        ({"input": "1\n", "output": "2"}, Trial("1\n", None, "2")),
        ({"call": "f", "arguments": [1, "a", None], "returns": [2]}, Trial("", "f(*[1, 'a', None])", [2])),
        ({"expression": "S().f(1)", "returns": 2}, Trial("", "S().f(1)", 2)),
        ("assert f(1, 'a') == (2, {'x': 3})", Trial("", "f(1, 'a')", (2, {"x": 3}))),
        ("assert set(f(1)) == set((4, 5))", Trial("", "set(f(1))", {4, 5})),
        ("assert f(-1) == -1.5", Trial("", "f(-1)", -1.5)),
        ("assert f(1)", Trial("", "bool(f(1))", True)),
        ("assert not f(1)", Trial("", "bool(f(1))", False)),
    ],
)
def test_tests_come_in_several_forms_and_expectations_leave_the_expression(test, expected):
    assert read_tests([test]) == [expected]
    if not isinstance(test, str):
        assert read_tests(json.dumps([test])) == [expected]


@pytest.mark.parametrize(
    "test",
    [
        {"input": "1"},
        {"call": "f(1) or g", "arguments": [], "returns": 1},
        "assert f(1) == g(1)",
        "assert f(1) > 2",
        "f(1) == 2",
        "assert f(",
        5,
    ],
)
def test_what_is_no_test_is_refused(test):
    with pytest.raises(ValueError, match="code:"):
        read_tests([test])


def test_a_program_scores_the_share_of_tests_it_passes(isolated):
    double = fenced("def f(x):\n    print('noise')\n    return x * 2\nif __name__ == '__main__':\n    print(f(int(input())))")
    tests = [
        {"input": "4\n", "output": "noise\n 8 \n\n"},
        {"input": "4\n", "output": "8"},
        {"call": "f", "arguments": [[1, 2]], "returns": [1, 2, 1, 2]},
        "assert f((1,)) == (1, 1)",
        "assert f(0.15) == 0.3",
        "assert f('a') == 'ab'",
        "assert f(None) == None",
        {"expression": "{f(1): {f(2)}}", "returns": {2: {4}}},
    ]
    found = code([""] * 4, [double, "no code", double, double], tests=[tests, tests[:1], [], json.dumps(tests[:2])])
    assert found == [5 / 8, 0.0, None, 0.5]


@pytest.mark.parametrize(
    "source",
    [
        "class Equal:\n    def __eq__(self, other): return True\nf = lambda x: Equal()",
        "class Equal(int):\n    def __eq__(self, other): return True\nf = lambda x: Equal(1)",
        "import json\njson.dumps = lambda value: 'true'\nf = lambda x: 1",
        "import sys\nf = lambda x: sys._getframe(1).f_locals.get('expected', 1)",
        "f = lambda x: float('nan')",
        "f = lambda x: f(x)",
        "x = []\nx.append(x)\nf = lambda _: x",
        "f = lambda x: 10 ** 5000",
        "import os, sys\nos.write(3, b'[[[')\nos._exit(0)",
    ],
)
def test_a_value_that_only_claims_to_be_equal_is_not(isolated, source):
    assert code([""], [fenced(source)], tests=[["assert f(5) == 25"]]) == [0.0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda v: st.lists(v) | st.tuples(v, v) | st.dictionaries(st.text() | st.integers(), v) | st.frozensets(st.integers()),
    max_leaves=10,
)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(VALUES, VALUES)
def test_values_survive_json_and_equal_themselves_alone(value, other):
    seen = json.loads(json.dumps(plain(value)))
    assert same(seen, plain(value))
    assert same(seen, plain(other)) or value != other


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.text(alphabet=st.sampled_from("` \npython1")))
def test_any_text_holds_a_program_or_none(text):
    assert program(text) in text
