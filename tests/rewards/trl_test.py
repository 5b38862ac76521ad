"""What TRL says of the same completions, from `third_party/trl/golden_rewards.py`."""

import json
import pathlib

import pytest

from ftjax.rewards import build

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "goldens" / "rewards.json").read_text(encoding="utf-8"))
COLUMNS = {"answer": GOLDEN["answers"], "completion_ids": [list(map(int, ids)) for ids in GOLDEN["completion_ids"]]}


@pytest.mark.parametrize(
    "theirs, ours, options",
    [
        ("accuracy", "maths", {}),
        ("reasoning_accuracy", "maths", {"after": "</think>"}),
        ("think_format", "think_format", {}),
        ("cosine", "cosine", {"max_tokens": 40, "correct": "maths"}),
        ("repetition", "repetition", {"ngram_tokens": 3, "max_penalty": -0.5}),
        ("soft_overlong", "soft_overlong", {"max_tokens": 50, "soft_tokens": 20}),
    ],
)
def test_scores_are_those_of_trl(theirs, ours, options):
    reward = build([ours], {ours: options})[ours]
    found = reward([""] * len(GOLDEN["answers"]), GOLDEN["completions"], **COLUMNS)
    assert [score is None for score in found] == [score is None for score in GOLDEN[theirs]]
    assert [score for score in found if score is not None] == pytest.approx([score for score in GOLDEN[theirs] if score is not None])
    assert len(set(found)) > 1
