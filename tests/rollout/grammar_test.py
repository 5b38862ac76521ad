"""Grammars: what is written is what they say, beside rows that have none."""

import json
import re

import pytest

from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.rollout import Request, grammar, settings
from tests.rollout.engine_test import engine
from tests.rollout.generate_test import complete, prompts, tiny

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
DRAWN = settings(temperature=2.0)


def words(found):
    return [TOKENIZER.decode(sample.tokens[:-1]) for sample in found]


def test_completions_are_the_choices_and_rows_without_a_grammar_are_free(key):
    texts = ["yes", "yesterday", "no"]
    chosen = grammar.choice(texts, TOKENIZER, eos_id=END)
    row, other = prompts(2, 5)
    requests = [Request(row, 12, sampling=DRAWN, key=key, num_samples=12, grammar=chosen), Request(other, 12)]
    *found, free = engine(eos_ids=(END,)).generate(tiny()[1], requests)
    assert set(words(found)) <= set(texts) and len(set(words(found))) > 1
    assert {sample.reason for sample in found} == {"eos"}
    assert free.tokens.tolist() == complete(*tiny(), [other], eos_ids=(END,)).tokens[0, : len(free.tokens)].tolist()


def test_grammars_share_their_beginnings_and_stand_behind_each_other_in_a_table():
    one, two = (grammar.choice(texts, TOKENIZER, eos_id=END) for texts in (["ab", "ac"], ["b"]))
    table = grammar.tabulate([one, two], 260)
    assert grammar.starts([one, two]) == (1, 5) and table.shape == (8, 260) and not table[0].any()
    a, b, c = TOKENIZER.encode("abc")
    assert (table[1, a], table[2, b], table[2, c], table[5, b]) == (2, 3, 4, 6)
    assert [int((row != grammar.NOTHING).sum()) for row in table[1:7]] == [1, 2, 1, 1, 1, 1]
    assert table[3, END] == 3 and table[6, END] == 6


@pytest.mark.parametrize("texts", [[], ["a", ""]], ids=["none", "empty"])
def test_choices_that_are_none_are_refused(texts):
    with pytest.raises(ValueError, match="texts that are not empty"):
        grammar.choice(texts, TOKENIZER, eos_id=END)


def test_a_grammar_that_ends_nowhere_or_is_of_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="grammar: after state 1 no token may follow"):
        grammar.Grammar([{7: 1}, {}])
    with pytest.raises(ValueError, match="grammar: token 260 is none of the model's 260"):
        grammar.tabulate([grammar.Grammar([{7: 0, 260: 0}])], 260)


def test_completions_match_an_expression_and_a_schema(key):
    pytest.importorskip("outlines_core")
    jsonschema = pytest.importorskip("jsonschema")
    pattern = "(ab|[0-9]{2})x*z"
    properties = {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    made = [grammar.regex(pattern, TOKENIZER, eos_id=END), grammar.json_schema(schema, TOKENIZER, eos_id=END)]
    requests = [Request(prompts(1, 5)[0], 40, sampling=DRAWN, key=key, num_samples=4, grammar=one) for one in made]
    samples = engine(eos_ids=(END,)).generate(tiny()[1], requests)
    assert [sample.finished for sample in samples] == [True] * 8  # either is at its end long before 40 tokens
    matching, parsed = words(samples[:4]), [json.loads(text) for text in words(samples[4:])]
    assert all(re.fullmatch(pattern, text) for text in matching) and len(set(matching)) > 1
    for one in parsed:
        jsonschema.validate(one, schema)
    assert len(set(map(str, parsed))) > 1
