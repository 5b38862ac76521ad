"""A stop text ends a completion where it is first complete, and none that was complete before `min_tokens`."""

import pytest

from ftjax.rollout import shown
from ftjax.rollout.stopping import certain, end


def decode(tokens, *, skip_special_tokens):
    """A character a token; 0 is special."""
    assert skip_special_tokens
    return "".join(chr(token) for token in tokens if token)


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "count", "words"),
    [
        ("x\n\nQuestion: 2", ("\n",), 0, 2, "x"),
        ("x\n\nQuestion: 2", ("\n",), 2, 2, "x"),
        ("x\n\nQuestion: 2", ("\n",), 3, 3, "x\n"),
        ("x\n\nQuestion: 2", ("\n",), 4, 0, "x\n\nQuestion: 2"),
        ("x\n\nQuestion: 2\ny", ("\n",), 9, 15, "x\n\nQuestion: 2"),
        ("x\n\nQuestion: 2", ("\n\n",), 3, 3, "x"),
        ("x\n\nQuestion: 2", ("Question:", "\nQuestion: "), 0, 12, "x\n\n"),
        ("aaaa", ("aa",), 3, 3, "a"),
        ("abc", (), 2, 0, "abc"),
        ("abc", ("z",), 0, 0, "abc"),
    ],
)
def test_a_completion_ends_at_the_first_text_that_is_complete_from_min_tokens_on(text, stop, min_tokens, count, words):
    tokens = list(map(ord, text))
    assert end(decode, tokens, stop, min_tokens=min_tokens) == count
    assert shown(decode, tokens[: count or None], stop, min_tokens=min_tokens) == words
    for before in range(count or len(tokens)):
        assert end(decode, tokens, stop, before=before, min_tokens=min_tokens) == count


def test_what_a_further_token_can_change_is_not_certain():
    assert [certain(text, ("\nQ:",)) for text in ("ab", "ab\n", "ab\nQ", "ab\ufffd")] == [2, 2, 2, 2]
