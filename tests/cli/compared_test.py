"""Runs whose samples are compared with an opponent's, or selected, or held to their reference by a penalty that adapts."""

import pytest

from ftjax import rewards
from ftjax.checkpoint import Checkpoints
from ftjax.cli import main
from ftjax.cli.stop import Stop
from ftjax.logs.writers import read_jsonl
from tests.cli.online_test import high_bytes, reported
from tests.cli.train_test import assert_bitwise_equal, stored

CONFIG = """
from configs import base

def get_config(arg=""):
    config = base.online(arg)
    config.steps = 24
    config.data.sources.tasks = base.source("tasks:compare", split="train[:64]")
    config.data.update({"max_tokens": 128, "batch_size": 16})
    config.model.update({"preset": "tiny-llama", "random": True, "dtype": "float32"})
    config.tokenizer, config.methods = "bytes", ("full",)
    config.rewards.numeric_match = 4.0
    config.rollout.update({"max_tokens": 8, "samples_per_prompt": 4, "show": 1})
    config.optimizer.update({"learning_rate": 0.01, "warmup_steps": 0})
    config.eval.every_steps = 0
    config.checkpoint.every_steps, config.logging.every_steps, config.logging.tensorboard = 0, 1, False
    config.mesh.data = 1
    return config.lock()
"""


@pytest.fixture
def train(compiled, tmp_path, monkeypatch):
    """`train(name of a run, algorithm, *more) -> workdir`."""
    (tmp_path / "compared.py").write_text(CONFIG)
    monkeypatch.setitem(rewards.REWARDS, "numeric_match", high_bytes)

    def run(name: str, algorithm: str, *more: str, code: int = 0):
        workdir = tmp_path / name
        options = [f"--config={tmp_path / 'compared.py'}:{algorithm}", f"--workdir={workdir}", f"--compile_cache={compiled}"]
        assert main.main(["train", *options, *more]) == code
        return workdir

    return run


@pytest.mark.parametrize("algorithm", ["ppo", "online_dpo", "xpo", "nash_md", "rejection_sampling"])
def test_a_sampler_that_is_not_the_trainer_is_refused(algorithm, train, sampled, capsys):
    sampled(scale=1.1)
    more = {"ppo": ("--config.methods=full,value_head", "--config.rollout.samples_per_prompt=1")}.get(algorithm, ())
    workdir = train("run", algorithm, *more, code=1)
    assert "the sampler and the trainer disagree" in capsys.readouterr().err and not Checkpoints(workdir / "checkpoints").steps()


def test_a_quantised_base_samples_and_learns_as_one(train, capsys):
    workdir = train("run", "grpo", "--config.methods=nf4,lora", "--config.steps=4", "--config.nf4.group=32")
    assert "sampler and trainer agree" in " ".join(capsys.readouterr().out.split())
    assert 0 < max(reported(workdir, "train/grad_norm")) and max(reported(workdir, "train/sampler_gap")) < 1e-5


@pytest.mark.parametrize("algorithm", ["xpo", "nash_md"])
def test_the_policy_comes_to_beat_its_opponent(algorithm, train):
    workdir = train("run", algorithm)
    wins, rows = reported(workdir, "train/opponent/wins"), read_jsonl(workdir / "rollouts.jsonl")
    assert abs(wins[0] - 0.5) < 0.35 and sum(wins[-6:]) / 6 > 0.6
    found = reported(workdir, "train/reward")
    assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.3
    assert len(rows) == 24 * 16 and all(row["opponent"]["reward"] is not None for row in rows)
    for row in rows:
        assert (row["advantage"] > 0) == (row["reward"] > row["opponent"]["reward"]) or abs(row["advantage"]) < 1e-6
    if algorithm == "xpo":
        assert reported(workdir, "train/wins") and reported(workdir, "train/logps/reference")
    else:
        assert reported(workdir, "train/kl")[-1] > 0


def test_what_is_kept_is_learnt_and_nothing_else(train):
    workdir = train("run", "rejection_sampling", "--config.rollout.keep=all", "--config.rollout.keep_above=2.5")
    rows, shares = read_jsonl(workdir / "rollouts.jsonl"), reported(workdir, "train/reward")
    assert sum(shares[-3:]) / 3 > sum(shares[:3]) / 3 + 0.5
    kept = [sum(row["reward"] >= 2.5 for row in rows if row["step"] == step) / 16 for step in range(1, 25)]
    assert reported(workdir, "train/kept") == pytest.approx(kept)


def test_steps_without_a_good_sample_teach_nothing_and_end_nothing(train, capsys):
    workdir = train("run", "rejection_sampling", "--config.rollout.keep_above=9.0", "--config.steps=7")
    assert "step 7 taught nothing: no token of its batch counts" in capsys.readouterr().out.replace("\n", " ")
    assert reported(workdir, "train/kept") == [0.0] * 7


def test_a_penalty_that_adapts_goes_on_bit_for_bit(train, monkeypatch):
    more = ("--config.rollout.kl_penalty=0.1", "--config.rollout.kl_target=0.5", "--config.rollout.kl_horizon=20", "--config.steps=6")
    whole = train("whole", "grpo", *more)
    coefs, found = reported(whole, "train/kl_coef"), reported(whole, "train/kl/sampled")
    for before, after, kl in zip(coefs, coefs[1:], found, strict=False):
        assert after == pytest.approx(before * (1 + 16 / 20 * min(max(kl / 0.5 - 1, -0.2), 0.2)), rel=1e-5)
    assert len(set(coefs)) > 2
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "at", lambda self, experience: setattr(self, "reason", "SIGTERM") or experience == 3)
        train("parts", "grpo", *more)
    parts = train("parts", "grpo", *more)
    assert_bitwise_equal(stored(parts), stored(whole))
    assert reported(parts, "train/kl_coef") == coefs
