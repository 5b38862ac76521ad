import json

import hypothesis
import hypothesis.strategies as st
import pytest

from ftjax.rewards.json_schema import json_schema

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}, "additionalProperties": False}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8
)


@pytest.mark.parametrize(
    "text, score",
    [
        ('{"n": 3}', 1.0),
        (' \n{"n": 3}\n', 1.0),
        ('Sure:\n```json\n{"n": 3}\n```\nDone.', 1.0),
        ('```\n{"n": "x"}\n```\nno:\n```json\n{"n": 0}\n```', 1.0),
        ('```json\n{"n": 3}', 1.0),
        ('{"n": -1}', 0.25),
        ('{"n": 3, "m": 4}', 0.25),
        ("7", 0.25),
        ('{"n": NaN}', 0.0),
        ('{"n": 1, "n": 2}', 0.0),
        ('Sure: {"n": 3}', 0.0),
        ('{"n": 3', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ('{"n": ' + "9" * 5000 + "}", 0.0),
    ],
)
def test_json_that_the_schema_allows(text, score):
    assert json_schema([""], [text], schema=SCHEMA, partial=0.25) == [score]


def test_a_schema_for_each_row():
    schemas = [SCHEMA, json.dumps({"type": "array"}), None]
    assert json_schema([""] * 3, ["[]"] * 3, schema=schemas) == [0.0, 1.0, None]


def test_a_nested_answer_to_a_recursive_schema_is_judged_or_refused():
    tree = {"type": "array", "items": {"$ref": "#"}}
    assert json_schema([""] * 2, ["[[[]]]", "[" * 900 + "]" * 900], schema=tree)[0] == 1.0


def test_nothing_is_fetched_and_a_wrong_schema_is_an_error():
    import jsonschema
    import referencing

    with pytest.raises(referencing.exceptions.Unresolvable):
        json_schema([""], ["1"], schema={"$ref": "http://127.0.0.1:9/schema"})
    with pytest.raises(jsonschema.SchemaError):
        json_schema([""], ["1"], schema={"type": "integr"})


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(VALUES)
def test_any_json_is_allowed_by_the_schema_of_all(value):
    assert json_schema([""], [json.dumps(value)], schema={"$schema": "https://json-schema.org/draft/2020-12/schema"}) == [1.0]


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.text())
def test_any_text_is_scored(text):
    assert json_schema([""], [text], schema={})[0] in (0.0, 1.0)
