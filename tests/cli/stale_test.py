"""`ftjax train` with a sampler that lags behind: the same as one after the other, however the thread runs, and as exact to go on with."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ftjax import rewards
from ftjax.cli import config as configs
from ftjax.cli import export, gathering, main, refusals, rollouts
from ftjax.cli.ahead import SAMPLED_BY
from ftjax.cli.stop import Stop
from ftjax.logs.writers import read_jsonl
from tests.cli.online_test import CONFIG, OPTIONS, high_bytes, reported
from tests.cli.train_test import assert_bitwise_equal, stored

LAGGING = """
from configs import grpo_smollm2_sums

def get_config(arg=""):
    config = grpo_smollm2_sums.get_config("smoke").unlock()
    config.loss.correction = "token_truncate"
    config.rollout.update({"staleness": 1, "show": 0})
    return config.lock()
"""


@pytest.fixture(scope="module")
def train(compiled, tmp_path_factory):
    """`train(workdir, *more) -> exit code` of a run of four experiences, of which the sampler lags one behind."""
    config = tmp_path_factory.mktemp("configs") / "lagging.py"
    config.write_text(LAGGING)

    def run(workdir, *more: str) -> int:
        fixed = ("train", f"--config={config}", f"--workdir={workdir}", f"--compile_cache={compiled}")
        with pytest.MonkeyPatch.context() as patch:
            if rewards.REWARDS["numeric_match"] is rewards.numeric_match:
                patch.setitem(rewards.REWARDS, "numeric_match", high_bytes)
            return main.main([*fixed, *OPTIONS, "--config.eval.every_steps=0", "--config.steps=8", *more])

    return run


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_step_off_is_the_loop_that_samples_with_the_weights_before(devices, train, whole, tmp_path, monkeypatch):
    sampler, weights, more = rollouts.sampler, [], (f"--config.mesh.data={devices}",)
    if devices > 1:
        whole = tmp_path / "lagging"
        assert train(whole, *more) == 0

    def previous(*arguments, **options):
        sample = sampler(*arguments, **options)

        def late(params, prompts, keys, **options):
            weights.append(jax.tree.map(jnp.copy, params))
            return sample(weights[max(0, len(weights) - 2)], prompts, keys, **options)

        return late

    monkeypatch.setattr(gathering.rollouts, "sampler", previous)
    assert train(tmp_path, "--config.rollout.staleness=0", *more) == 0
    assert len(weights) == 4 and not np.array_equal(*(jax.tree.leaves(params)[0] for params in weights[:2]))
    state, lagging = stored(tmp_path), stored(whole)
    past = {path: leaf for path, leaf in lagging.items() if SAMPLED_BY in path}
    assert_bitwise_equal(state, {path: leaf for path, leaf in lagging.items() if path not in past})
    assert read_jsonl(tmp_path / "rollouts.jsonl") == read_jsonl(whole / "rollouts.jsonl")
    assert reported(tmp_path, "train/loss") == reported(whole, "train/loss")
    last = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(weights[-1])[0]}
    assert len(past) == len(last)  # what samples the next experience, were there one
    for path, leaf in past.items():
        np.testing.assert_array_equal(leaf, last[path.split("['full']")[1]])


def test_weights_of_before_that_sample_something_else_are_refused_where_a_run_goes_on(train, sampled, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "at", lambda self, experience: setattr(self, "reason", "SIGTERM") or experience == 2)
        assert train(tmp_path) == 0
    sampled(scale=1.1)
    assert train(tmp_path) == 1 and "the sampler and the trainer disagree" in capsys.readouterr().err


def test_who_learns_values_may_be_sampled_for_ahead(train, tmp_path):
    assert train(tmp_path, "--config.algorithm=ppo", "--config.methods=value_head", "--config.rollout.samples_per_prompt=1") == 0
    assert reported(tmp_path, "train/staleness") == [0, 1, 1, 1]


def test_a_run_says_how_far_its_sampler_lags_and_what_that_weighs(whole):
    assert reported(whole, "train/staleness") == [0, 1, 1, 1] and min(reported(whole, "train/waiting_seconds")) >= 0
    at_first, *later = reported(whole, "train/behavior/logratio")
    assert at_first < 1e-5 < 1e-3 < min(later)
    least, mean, most = (reported(whole, f"train/behavior/weight{end}")[1:] for end in ("/min", "", "/max"))
    assert all(0 < a < b < c <= 3 for a, b, c in zip(least, mean, most, strict=True))


def test_a_signal_ends_the_run_and_its_thread_and_it_goes_on_bit_for_bit(train, whole, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupting(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return high_bytes(prompts, completions, **columns)

    with monkeypatch.context() as patch:
        patch.setitem(rewards.REWARDS, "numeric_match", interrupting)
        assert train(tmp_path) == 0
    assert "SIGTERM: saved at step" in capsys.readouterr().out and len(calls) < 4
    for thread in threading.enumerate():
        assert thread.name != "ahead" or thread.join(30) or not thread.is_alive()
    assert train(tmp_path) == 0
    assert_bitwise_equal(stored(tmp_path), stored(whole))
    assert read_jsonl(tmp_path / "rollouts.jsonl") == read_jsonl(whole / "rollouts.jsonl")
    assert reported(tmp_path, "train/reward") == reported(whole, "train/reward")


def test_a_reward_that_raises_in_the_thread_ends_the_run_by_name(train, tmp_path, monkeypatch, capsys):
    calls = []

    def broken(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) > 1:
            raise OSError("no such judge")
        return high_bytes(prompts, completions, **columns)

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", broken)
    assert train(tmp_path) == 1
    assert "'numeric_match' raised OSError: no such judge (row" in capsys.readouterr().err
    assert {row["step"] for row in read_jsonl(tmp_path / "rollouts.jsonl")} == {1}


@pytest.mark.parametrize(
    ("algorithm", "loss", "shown"),
    [
        ("grpo", {}, "loss.correction: with rollout.staleness=2 .* choose one of token_truncate, token_mask"),
        ("ppo", {"correction": None}, "loss.correction: .* 'ppo' would take its samples for its own"),
        ("nash_md", {}, "rollout.staleness: 'nash_md' takes samples for its own; set it to 0"),
        ("grpo", {"correction": "sequence_mask"}, None),
        ("dpo", {}, None),
    ],
)
def test_an_earlier_policy_s_samples_are_not_taken_for_this_one_s(algorithm, loss, shown):
    config = configs.load(CONFIG)
    with config.unlocked():
        config.update({"algorithm": algorithm, "loss": loss, "methods": ("lora", "value_head") if algorithm == "ppo" else ("lora",)})
        config.rollout.staleness = 2
    if shown is None:
        return refusals.check(config)
    with pytest.raises(ValueError, match=shown):
        refusals.check(config)


def test_several_processes_sample_together_and_not_ahead(monkeypatch):
    config = configs.load(CONFIG)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refusals.check(config)
    config.rollout.staleness = 1
    with pytest.raises(ValueError, match="rollout.staleness: the 2 processes of a run sample together"):
        refusals.check(config)


def test_a_checkpoint_with_a_past_is_exported(whole):
    found = export.trained(epath.Path(whole))
    state = {path.split("['full']")[1]: leaf for path, leaf in stored(whole).items() if path.startswith("['trainable']")}
    params = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(found.params)[0]}
    assert_bitwise_equal({path: np.asarray(leaf) for path, leaf in params.items()}, state)
