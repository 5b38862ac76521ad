"""Sizes of rollouts that do not fit together are refused with what would."""

import pathlib

import jax
import pytest

from ftjax import losses
from ftjax.cli import abstract, build, objective, rollouts
from ftjax.cli import config as configs

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "grpo_smollm2_sums.py")


def config(**changes):
    found = configs.load(CONFIG)
    found.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return found


def test_sizes_follow_from_rows_and_minibatches():
    found = config(
        data__batch_size=32, rollout__minibatches=4, rollout__epochs=3, steps=120, eval__every_steps=12, checkpoint__every_steps=0
    )
    rollouts.check(found)
    assert (rollouts.stride(found), rollouts.samples(found), rollouts.prompts(found)) == (12, 128, 16)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"steps": 101, "rollout__epochs": 2}, "steps: 101 is no multiple of the 2 steps .* nearest: 100"),
        ({"rollout__minibatches": 2, "eval__every_steps": 25}, "eval.every_steps: 25 is no multiple"),
        ({"checkpoint__every_steps": 3, "rollout__epochs": 4, "eval__every_steps": 0}, "checkpoint.every_steps: 3 .* nearest: 4"),
        ({"rollout__samples_per_prompt": 1}, "samples_per_prompt: 'grpo' compares at least 2"),
        ({"algorithm": "nash_md"}, "the opponents of 'nash_md' are not sampled"),
        ({"algorithm": "ppo"}, "methods: 'ppo' learns the values of states.*add 'value_head', as in methods=\\('lora', 'value_head'\\)"),
        ({"rollout__samples_per_prompt": 7}, "data.batch_size: 64 rows × 1 minibatches are no whole number of prompts with 7"),
        ({"rollout__temperature": 0.0}, "rollout.temperature: above 0"),
        ({"rollout__top_p": 1.5}, "top_p is in"),
        ({"rollout__max_tokens": 128}, "rollout.max_tokens: 128 leaves no prompt"),
        ({"rollout__advantages": "group_relativ"}, "rollout.advantages: there is no 'group_relativ'; nearest: 'group_relative'"),
        ({"data__packing": "best_fit"}, "data.packing: rollouts have a row each"),
        ({"rewards": {}}, "rewards: name at least one"),
        ({"rewards": {"exact_mach": 1.0}}, "there is no 'exact_mach'; nearest: 'exact_match'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(changes, shown):
    with pytest.raises(ValueError, match=shown):
        found = config(**{name: value for name, value in changes.items() if name != "rewards"})
        if "rewards" in changes:
            with found.unlocked():
                found.rewards = changes["rewards"]
        rollouts.check(found)


@pytest.mark.parametrize("name", [*losses.POLICY_LOSSES, "ppo"])
def test_every_algorithm_steps_on_what_its_estimator_writes(name):
    found = configs.load(f"{CONFIG}:smoke")
    found.update({"algorithm": name, "methods": ("lora", "value_head") if name == "ppo" else ("lora",)})
    rollouts.check(found)
    step = abstract.built(found, build.mesh(found))
    _, metrics = jax.eval_shape(step.train_step, step.state, step.frozen, step.batch)
    assert {"loss", "ratio", "entropy", "kl/old"} <= set(metrics)
    assert rollouts.estimator(found).values == ("loss/value" in metrics)


def test_an_entropy_bonus_has_a_gradient_and_the_sampler_s_temperature_is_the_trainer_s():
    found = config(rollout__temperature=0.7)
    model, _ = build.architecture(found)
    options = objective.score(found, model, build.mesh(found)).keywords
    assert options["temperature"] == 0.7 and not options["entropy_gradient"] and "entropy" in options["outputs"]
    with found.unlocked():
        found.loss.entropy_coef = 0.01
    assert objective.score(found, model, build.mesh(found)).keywords["entropy_gradient"]


def test_pairs_are_of_as_many_prompts_as_a_step_has_rows():
    found = config(algorithm="dpo", data__batch_size=4, rollout__minibatches=2, rollout__samples_per_prompt=3)
    found.update({"steps": 100, "checkpoint": {"every_steps": 0}, "eval": {"every_steps": 0}})
    rollouts.check(found)
    assert (rollouts.prompts(found), rollouts.samples(found)) == (8, 24)


def test_rollouts_and_what_learns_from_them_come_together():
    with pytest.raises(ValueError, match="'sft' learns from messages and not from rollouts"):
        rollouts.check(config(algorithm="sft"))
    found = config()
    with found.unlocked():
        del found.rollout
    with pytest.raises(ValueError, match="'grpo' needs a block config.rollout"):
        rollouts.check(found)
    found.update({"algorithm": "sft", "steps": 101})
    rollouts.check(found)
    assert rollouts.stride(found) == 1
