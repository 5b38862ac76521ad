"""Sizes of rollouts that do not fit together are refused with what would."""

import pathlib

import jax
import numpy as np
import pytest

from configs import base
from ftjax import losses
from ftjax.cli import abstract, build, objective, refusals, rollouts
from ftjax.cli import config as configs
from ftjax.online import ESTIMATORS
from ftjax.types import Batch, Scores

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "grpo_smollm2_sums.py")


def config(**changes):
    found = configs.load(CONFIG).unlock()
    found.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return found


def test_options_are_known_with_their_defaults_and_read_where_they_are_taken():
    assert {name: option.default for name, option in refusals.OPTIONS.items()} == {name: base.rollout()[name] for name in refusals.OPTIONS}
    assert {option for estimator in ESTIMATORS.values() for option in estimator.options} <= set(refusals.OPTIONS)
    set_to = {"rollout__gamma": 0.9, "rollout__kl_penalty": 0.1, "rollout__kl_estimator": "k3"}
    refusals.check(config(algorithm="reinforce_plus_plus", **set_to))
    more = {"rollout__lam": 0.9, "rollout__whiten_rewards": True, "methods": ("lora", "value_head")}
    refusals.check(config(algorithm="ppo", **set_to, **more))
    refusals.check(config(algorithm="nash_md", rollout__mixture=0.2))
    refusals.check(config(algorithm="rejection_sampling", rollout__keep="all", rollout__keep_above=1.0))


def test_an_objective_on_what_the_policy_writes_may_have_that_name():
    assert build.resolved(config(algorithm="online_dpo")).algorithm == "dpo" == build.resolved(config(algorithm="dpo")).algorithm
    assert build.resolved(config(algorithm="online_dop")).algorithm == "online_dop"  # which is refused


def test_sizes_follow_from_rows_and_minibatches():
    found = config(
        data__batch_size=32, rollout__minibatches=4, rollout__epochs=3, steps=120, eval__every_steps=12, checkpoint__every_steps=0
    )
    refusals.check(found)
    assert (rollouts.stride(found), rollouts.samples(found), rollouts.prompts(found)) == (12, 128, 16)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"steps": 101, "rollout__epochs": 2}, "steps: 101 is no multiple of the 2 steps .* nearest: 100"),
        ({"rollout__minibatches": 2, "eval__every_steps": 25}, "eval.every_steps: 25 is no multiple"),
        ({"checkpoint__every_steps": 3, "rollout__epochs": 4, "eval__every_steps": 0}, "checkpoint.every_steps: 3 .* nearest: 4"),
        ({"rollout__samples_per_prompt": 1}, "samples_per_prompt: 'grpo' compares at least 2"),
        ({"rollout__advantages": "preferred"}, "'preferred' is for what has an opponent .*'grpo' has none: set it to 'auto'"),
        ({"algorithm": "xpo", "rollout__advantages": "leave_one_out"}, "'xpo' has one: set it to 'auto'"),
        ({"algorithm": "nash_md", "methods": ("prefix_tuning",)}, "methods: the reference has none of the virtual tokens"),
        ({"algorithm": "dpo", "reference__logps": "cached"}, "reference.logps: what the policy will write is not known before the run"),
        ({"algorithm": "xpo", "reference__every_steps": 5}, "reference.every_steps: the opponent of 'xpo' is where the run began"),
        ({"algorithm": "nash_md", "rollout__mixture": 1.5}, "rollout.mixture: the share of the reference is in"),
        ({"algorithm": "nash_md", "rollout__kl_penalty": 0.1}, "rollout.kl_penalty: .* hold it by loss.beta"),
        ({"algorithm": "rejection_sampling", "rollout__keep": "al"}, "rollout.keep: there is no 'al'; nearest: 'all'"),
        ({"algorithm": "rejection_sampling", "rollout__keep": "all"}, "rollout.keep_above: .* nothing is left out"),
        ({"algorithm": "rejection_sampling", "rollout__samples_per_prompt": 1}, "rollout.keep_above: of 1 samples .* nothing is left out"),
        ({"rollout__kl_penalty": 0.1, "rollout__kl_estimator": "k3+"}, "rollout.kl_estimator: there is no 'k3\\+'; nearest: 'k3'"),
        ({"rollout__kl_target": 6.0}, "rollout.kl_target: 6.0 nats a sample need a rollout.kl_penalty above 0"),
        ({"rollout__kl_target": 6.0, "rollout__kl_penalty": 0.1, "rollout__kl_horizon": 9}, "rollout.kl_horizon: at least the 64 samples"),
        ({"algorithm": "ppo"}, "methods: 'ppo' learns the values of states.*add 'value_head', as in methods=\\('lora', 'value_head'\\)"),
        ({"rollout__lam": 0.9}, "rollout.lam: 0.9 acts nowhere with 'grpo': it is read by rollout.advantages 'gae'; leave it at 0.95"),
        ({"rollout__gamma": 0.99}, "rollout.gamma: 0.99 .* read by rollout.advantages 'reinforce_plus_plus' and 'gae'; leave it at 1.0"),
        ({"rollout__whiten_rewards": True}, "rollout.whiten_rewards: True acts nowhere"),
        ({"rollout__keep": "all"}, "rollout.keep: 'all' acts nowhere with 'grpo': it is read by 'rejection_sampling'; leave it at 'best'"),
        ({"algorithm": "dpo", "rollout__keep_above": 1.0}, "rollout.keep_above: 1.0 acts nowhere with 'dpo'.*leave it at None"),
        ({"algorithm": "xpo", "rollout__mixture": 0.2}, "rollout.mixture: 0.2 acts nowhere with 'xpo': it is read by 'nash_md'"),
        ({"rollout__kl_horizon": 500}, "rollout.kl_horizon: 500 acts nowhere .* a rollout.kl_target above 0; leave it at 10000"),
        ({"rollout__kl_estimator": "k3"}, "rollout.kl_estimator: 'k3' acts nowhere .* a rollout.kl_penalty that is not 0"),
        ({"rollout__samples_per_prompt": 7}, "data.batch_size: 64 rows × 1 minibatches are no whole number of prompts with 7"),
        ({"rollout__temperature": 0.0}, "rollout.temperature: above 0"),
        ({"rollout__top_p": 1.5}, "top_p is in"),
        ({"rollout__top_p": 0.9, "loss__correction": "token_truncate"}, "loss.correction: it compares the policy with the sampler, and "),
        ({"rollout__min_tokens": 2, "loss__off_policy_threshold": 1.0}, "loss.off_policy_threshold: it compares the policy with the"),
        ({"rollout__max_tokens": 128}, "rollout.max_tokens: 128 leaves no prompt"),
        ({"rollout__advantages": "group_relativ"}, "rollout.advantages: there is no 'group_relativ'; nearest: 'group_relative'"),
        ({"rollout__advantages": "decoupled", "rollout__unfinished_penalty": 0.5}, "rollout.unfinished_penalty: it acts on the sum"),
        ({"data__packing": "best_fit"}, "data.packing: rollouts have a row each"),
        ({"data__packing": "shared", "algorithm": "dpo"}, "data.packing: 'dpo' does not learn from all samples of a prompt"),
        ({"data__packing": "shared", "data__accumulation": 16}, "data.batch_size: 64 samples .* a multiple of 128"),
        ({"rollout__min_tokens": 9}, "rollout.min_tokens: from 0 to rollout.max_tokens=8, not 9"),
        ({"rollout__stop": ("",)}, "rollout.stop: a tuple of texts that are not empty"),
        ({"rollout__slots": -1}, "rollout.slots: 0, as many as there are samples, or more, not -1"),
        ({"algorithm": "online_dop"}, "algorithm: there is no 'online_dop'; nearest: "),
        ({"rewards": {"target_length": 1.0}}, "'target_length' needs the option 'target_tokens'"),
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
        refusals.check(found)


@pytest.mark.parametrize("name", [*losses.POLICY_LOSSES, "ppo"])
def test_every_algorithm_steps_on_what_its_estimator_writes(name):
    found = configs.load(f"{CONFIG}:smoke")
    found.update({"algorithm": name, "methods": ("lora", "value_head") if name == "ppo" else ("lora",)})
    refusals.check(found)
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


def test_what_is_taken_for_a_log_ratio_is_that_or_one_of_two_that_are_never_negative():
    """TRL's PPO has k1, which is usual, and k3 = 1/r - 1 + log r; k2 is the square."""
    ratio, found = np.array([0.5, 1.0, 3.0]), {}
    for name in ("k1", "k2", "k3"):
        found[name] = rollouts.divergence(config(rollout__kl_estimator=name))(jax.numpy.asarray(np.log(ratio), "float32"))
    np.testing.assert_allclose(found["k1"], np.log(ratio), rtol=1e-6)
    np.testing.assert_allclose(found["k2"], np.log(ratio) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(found["k3"], 1 / ratio - 1 + np.log(ratio), rtol=1e-5)


def test_ppo_and_rloo_are_held_to_their_reference_unless_told_otherwise():
    """As in TRL, where RLOO's beta is 0.05 too, of k1 over a whole response."""
    found = {name: base.online(name).rollout for name in ("ppo", "rloo", "grpo", "reinforce")}
    assert [asked.kl_penalty for asked in found.values()] == [0.05, 0.05, 0, 0] and found["rloo"].kl_estimator == "k1"
    assert rollouts.referred(base.online("rloo")) and not rollouts.referred(base.online("reinforce"))


@pytest.mark.parametrize(
    ("algorithm", "options", "divisor"),
    [
        ("dr_grpo", {}, 8),  # rollout.max_tokens of the config
        ("dr_grpo", {"max_tokens": 20}, 20),
        ("grpo", {"reduction": "constant_length"}, 8),
        ("dr_grpo", {"reduction": "sequence_sum"}, 1),
        ("grpo", {}, 3),  # tokens of the response
    ],
)
def test_what_sums_are_divided_by_is_the_most_tokens_of_a_sample(algorithm, options, divisor):
    """TRL's max_completion_length. Of three tokens of the advantage 2 and the ratio 1."""
    found = config(algorithm=algorithm)
    with found.unlocked():
        found.loss = options
    ids, mask = jax.numpy.zeros((1, 3), int), jax.numpy.ones((1, 3))
    mean, _ = objective.loss(found)(Scores(logps=-mask), Batch(ids, mask, ids, ids + 1, advantages=2 * mask[:, 0]))
    assert mean.value() == pytest.approx(-6 / divisor)


@pytest.mark.parametrize("name", ["dpo", "xpo", "nash_md", "rejection_sampling"])
def test_what_compares_or_selects_samples_steps_on_what_becomes_of_them(name):
    found = configs.load(f"{CONFIG}:smoke")
    with found.unlocked():
        found.algorithm, found.loss = name, {}
    refusals.check(found)
    step = abstract.built(found, build.mesh(found))
    _, metrics = jax.eval_shape(step.train_step, step.state, step.frozen, step.batch)
    assert {"loss", {"dpo": "rewards/margin", "xpo": "wins", "nash_md": "kl"}.get(name, "nll")} <= set(metrics)
    assert step.batch.tokens.ndim == 2 + (name in ("dpo", "xpo")) and len(step.batch.tokens) == found.data.batch_size


def test_a_row_is_a_sample_or_what_is_chosen_of_those_of_a_prompt():
    counts = {}
    for name in ("grpo", "dpo", "xpo", "nash_md", "rejection_sampling"):
        found = config(algorithm=name, data__batch_size=8, rollout__samples_per_prompt=4)
        refusals.check(found)
        counts[name] = rollouts.prompts(found), rollouts.samples(found)
    assert counts == {"grpo": (2, 8), "dpo": (8, 32), "xpo": (2, 8), "nash_md": (2, 8), "rejection_sampling": (8, 32)}
    found.rollout.keep = "all"
    assert (rollouts.prompts(found), rollouts.samples(found)) == (2, 8)


def test_pairs_are_of_as_many_prompts_as_a_step_has_rows():
    found = config(algorithm="dpo", data__batch_size=4, rollout__minibatches=2, rollout__samples_per_prompt=3)
    found.update({"steps": 100, "checkpoint": {"every_steps": 0}, "eval": {"every_steps": 0}})
    refusals.check(found)
    assert (rollouts.prompts(found), rollouts.samples(found)) == (8, 24)


def test_rollouts_and_what_learns_from_them_come_together():
    with pytest.raises(ValueError, match="'sft' learns from messages and not from rollouts"):
        refusals.check(config(algorithm="sft"))
    found = config()
    with found.unlocked():
        del found.rollout
    for name in ("grpo", "xpo", "rejection_sampling"):
        found.algorithm = name
        with pytest.raises(ValueError, match=f"'{name}' needs a block config.rollout"):
            refusals.check(found)
    found.update({"algorithm": "sft", "steps": 101})
    refusals.check(found)
    assert rollouts.stride(found) == 1
