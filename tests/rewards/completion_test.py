import pytest

from ftjax.rewards import REWARDS, text


@pytest.mark.parametrize(
    "completion, said",
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([{"content": "no role"}], "no role"),
        ([{"role": "assistant", "content": "calls"}, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "five"}], "five"),
        ([{"role": "assistant", "content": "calls"}, {"role": "tool", "content": "5"}], "calls"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}], "ab"),
        ([], ""),
    ],
)
def test_what_a_completion_says(completion, said):
    assert text(completion) == said


@pytest.mark.parametrize("name", ["exact_match", "numeric_match", "choice", "think_format", "tag_format", "tag_count", "sentiment"])
def test_messages_score_as_their_text(name):
    for said in ("A", "7", "<think>x</think>", "good"):
        columns = {"answer": ["A"]}
        assert REWARDS[name](["Q"], [[{"role": "assistant", "content": said}]], **columns) == REWARDS[name](["Q"], [said], **columns)
