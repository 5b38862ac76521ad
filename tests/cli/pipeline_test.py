"""RLHF from one command to the next: a start, merged; a reward model of it; and PPO, which that judges."""

import pathlib

import numpy as np
import pytest

from ftjax.cli import critic, main
from ftjax.logs.writers import read_jsonl
from tests.cli.reports import reported

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
PPO = """
from configs import ppo_smollm2_reviews

def get_config(arg=""):
    config = ppo_smollm2_reviews.get_config("smoke")
    with config.unlocked():
        config.rewards = ppo_smollm2_reviews.get_config().rewards
    return config
"""


def test_ppo_is_judged_by_the_reward_model_of_the_run_before(compiled, tmp_path):
    start, reward, policy = tmp_path / "start", tmp_path / "reward", tmp_path / "policy"
    (tmp_path / "ppo.py").write_text(PPO)
    common = ("--config.steps=2", "--config.logging.tensorboard=False", f"--compile_cache={compiled}")
    faster = "--config.optimizer.learning_rate=0.01"
    merged = ("--config.model.random=False", f"--config.model.name={tmp_path / 'model'}", "--config.tokenizer=")
    judge = f"--config.rewards.reward_model.folder={reward}"

    def train(config, workdir, *more):
        assert main.main(["train", f"--config={config}", f"--workdir={workdir}", *common, *more]) == 0

    train(f"{FOLDER / 'sft_smollm2_reviews.py'}:smoke", start, faster)
    assert main.main(["merge", f"--workdir={start}", f"--output={tmp_path / 'model'}"]) == 0
    train(f"{FOLDER / 'reward_smollm2_reviews.py'}:smoke", reward, *merged, faster)
    train(tmp_path / "ppo.py", policy, *merged, judge)
    rows = read_jsonl(policy / "rollouts.jsonl")
    found = [row["rewards"]["reward_model"] for row in rows]
    assert found == pytest.approx(critic.load(str(reward))([row["prompt"] for row in rows], [row["completion"] for row in rows]), abs=1e-5)
    assert np.ptp(found) > 1e-4 and [row["reward"] for row in rows] == pytest.approx(found)
    assert reported(policy, "train/rewards/reward_model") and np.isfinite(reported(policy, "eval/rewards/reward_model"))
