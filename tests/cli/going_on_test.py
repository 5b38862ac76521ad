"""Every kind of online learning goes on bit for bit from the middle of its run; a new one joins by standing in `losses.NEEDS`."""

import shutil

import pytest

from configs import base
from ftjax import data, losses, rewards
from ftjax.checkpoint import Checkpoints
from ftjax.cli import main, rollouts
from ftjax.logs.writers import read_jsonl
from tests.cli.compared_test import CONFIG
from tests.cli.online_test import high_bytes
from tests.cli.reports import reported
from tests.cli.train_test import assert_bitwise_equal, stored

COMMON = (
    "--config.steps=12",
    "--config.checkpoint.every_steps=4",
    "--config.checkpoint.keep=9",
    "--config.logging.every_steps=3",  # a report is of steps before and after the break
    "--config.methods=lora",
    "--config.lora.targets=('q_proj','down_proj')",
    "--config.lora.dropout=0.1",  # so that the key of the state matters
    "--config.model.remat=none",  # which compiles sooner
    "--config.data.batch_size=4",
    "--config.rollout.samples_per_prompt=2",
    "--config.rollout.minibatches=2",
    "--config.rollout.slots=8",
    "--config.rollout.show=0",
)
ADAPTIVE = ("--config.rollout.kl_penalty=0.1", "--config.rollout.kl_target=0.01", "--config.rollout.kl_horizon=16")
OPTIONS = {
    "grpo": (*ADAPTIVE, "--config.rollout.dynamic_rounds=1"),
    "ppo": (*ADAPTIVE, "--config.methods=value_head", "--config.rollout.epochs=2", "--config.rollout.whiten_rewards=True"),
    "rejection_sampling": ("--config.rollout.keep=all", "--config.rollout.keep_above=2.0"),
}
"""What a run remembers, or could forget, beside what all have."""


def kinds():
    """Return the first algorithm of each kind: the algorithms of one differ in functions of scores, batch and evidence alone."""
    found = {}
    for name in ("grpo", *losses.NEEDS):  # the best known of its kind
        needs = losses.NEEDS[name]
        if needs.data in (data.ROLLOUTS, data.PAIRS) or needs.selected:
            worth = rollouts.estimator(base.online(name))
            found.setdefault((needs.data, needs.opponent, needs.selected, worth.greedy, worth.values), name)
    return list(found.values())


OF_A_PROCESS = ("time", "train/mfu", "train/memory_gb", "train/sampler_gap")
"""What each process measures of itself, with all that counts seconds."""


def told(workdir):
    """What a run reported of its steps."""
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in row]
    return [{name: value for name, value in row.items() if name not in OF_A_PROCESS and "second" not in name} for row in rows]


def test_the_kinds_are_those_that_are_known_to_differ():
    assert set(kinds()) >= {*OPTIONS, "dpo", "xpo", "nash_md", "remax"}


@pytest.mark.parametrize("algorithm", kinds())
def test_a_run_that_broke_off_goes_on_bit_for_bit(algorithm, compiled, tmp_path, monkeypatch):
    """In the middle of a report and of a penalty that adapts: what was written after the last checkpoint is written again."""
    monkeypatch.setitem(rewards.REWARDS, "numeric_match", high_bytes)
    (tmp_path / "config.py").write_text(CONFIG)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def train(workdir):
        common = ("train", f"--config={tmp_path / 'config.py'}:{algorithm}", f"--workdir={workdir}", f"--compile_cache={compiled}")
        assert main.main([*common, *COMMON, *OPTIONS.get(algorithm, ())]) == 0

    train(whole)
    shutil.copytree(whole, parts)
    assert Checkpoints(parts / "checkpoints").steps() == [4, 8, 12]
    for step in (8, 12):
        shutil.rmtree(parts / "checkpoints" / f"{step:08d}")
    train(parts)
    assert_bitwise_equal(stored(parts), stored(whole))
    assert told(parts) == told(whole) and len(told(whole)) == 4
    assert read_jsonl(parts / "rollouts.jsonl") == read_jsonl(whole / "rollouts.jsonl")
    if ADAPTIVE[0] in OPTIONS.get(algorithm, ()):
        coefs = reported(whole, "train/kl_coef")
        assert len(set(coefs)) == len(coefs) > 2
