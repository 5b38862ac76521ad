"""The rewards of a config judge what they are shown, by their weights."""

import numpy as np
import pytest

from ftjax import data, rollout
from ftjax.cli import config as configs
from ftjax.cli import judging
from tests.cli.rollouts_test import CONFIG

SAMPLES = [rollout.Sample(*[np.arange(n)] * 3, "eos") for n in (1, 4)]


def prompt(*messages: str, **row) -> data.Prompt:
    roles = ("user", "assistant") * 2
    said = tuple({"role": role, "content": content} for role, content in zip(roles, messages, strict=False))
    return data.Prompt(np.arange(3), data.Example(said, columns=row))


def judge(blocks, **options):
    config = configs.load(CONFIG)
    with config.unlocked():
        config.rewards = blocks
    return judging.judge(config, **options)


def test_rewards_see_the_answer_the_columns_and_the_tokens_and_are_weighed():
    panel = judge({"numeric_match": 2.0, "target_length": {"weight": 0.5, "target_tokens": 4}})
    judged = panel([prompt("1 + 1?", "2", level=1), prompt("2 + 1?", answer="3")], ["It is 2", "4"], SAMPLES)
    total, each = judging.as_rows(judged, (1, 2))
    np.testing.assert_allclose(each["numeric_match"], [[1, 0]])
    np.testing.assert_allclose(each["target_length"], [[-0.75, 0]])
    np.testing.assert_allclose(total, [[2 - 0.375, 0]])


def test_a_trained_reward_model_is_loaded_from_its_folder_and_shown_the_conversation():
    seen = []

    def load(folder):
        return lambda prompts, texts: [seen.append((folder, prompt, text)) or 0.5 for prompt, text in zip(prompts, texts, strict=True)]

    panel = judge({"reward_model": {"folder": "runs/reward", "clip": 0.25}}, load=load)
    judged = panel([prompt("Hello"), prompt("Hello", "Yes?", "Who?", "I.")], ["Hi", "Me"], SAMPLES)
    assert judged.rewards.tolist() == [0.25, 0.25]
    assert seen[0] == ("runs/reward", "Hello", "Hi") and [message["content"] for message in seen[1][1]] == ["Hello", "Yes?", "Who?"]
    assert judge({"reward_model": {"folder": "runs/reward"}})  # whose options alone are looked at


def test_a_reward_that_fails_says_how_to_go_on_without_it():
    with pytest.raises(ValueError, match="'numeric_match' needs 'answer'|judging.on_error='skip'"):
        judge({"target_length": {"target_tokens": "four"}})([prompt("1 + 1?", "2")], ["2"], SAMPLES[:1])
