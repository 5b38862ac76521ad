"""What a config may not say of what a policy or a student writes, with what would do; all of it is asked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ftjax import data, losses, peft
from ftjax.cli import environments, judging, objective, rollouts
from ftjax.losses.correction import CORRECTIONS
from ftjax.online import ESTIMATORS
from ftjax.rollout.stopping import refusal
from ftjax.tree import nearest

KEEP = ("best", "all")
"""Which samples of a prompt rejection sampling keeps, of those that are good enough."""


class Option(NamedTuple):
    """A field of `config.rollout` that not every run reads."""

    default: Any
    """Of `configs.base.rollout`."""
    read: Callable[[Any], bool]
    """`(config) -> whether it is`."""
    reader: str
    """What reads it."""


def _of_estimators(name: str, default: Any) -> Option:
    """Return an option of some estimators of advantages."""
    readers = [repr(one) for one, estimator in ESTIMATORS.items() if name in estimator.options]
    return Option(default, lambda config: name in rollouts.estimator(config).options, f"rollout.advantages {' and '.join(readers)}")


OPTIONS: Mapping[str, Option] = {
    "gamma": _of_estimators("gamma", 1.0),
    "lam": _of_estimators("lam", 0.95),
    "whiten_rewards": _of_estimators("whiten_rewards", False),
    "keep": Option("best", rollouts.selected, "'rejection_sampling'"),
    "keep_above": Option(None, rollouts.selected, "'rejection_sampling'"),
    "mixture": Option(0.5, lambda config: objective.needs(config).opponent == "mixture", "'nash_md'"),
    "kl_estimator": Option("k1", lambda config: config.rollout.kl_penalty != 0, "a rollout.kl_penalty that is not 0"),
    "report_kl": Option(False, lambda config: objective.needs(config).data == data.ROLLOUTS, "what learns from all samples (grpo, ppo)"),
    "kl_horizon": Option(10_000, lambda config: config.rollout.kl_target != 0, "a rollout.kl_target above 0"),
}
"""Who reads what."""


def check(config) -> None:
    """Refuse sizes that do not fit together; asked before anything is loaded."""
    wanted = objective.needs(config).data
    if not rollouts.used(config):
        if wanted == data.ROLLOUTS or rollouts.opposed(config) or rollouts.selected(config):
            raise ValueError(f"rollout: {config.algorithm!r} needs a block config.rollout; begin the config with base.online().")
        return
    if wanted not in (data.ROLLOUTS, data.PAIRS) and not rollouts.selected(config):
        raise ValueError(f"algorithm: {config.algorithm!r} learns from {wanted} and not from rollouts; leave the block config.rollout out.")
    if config.sweep:
        raise ValueError(f"sweep: members of {config.algorithm!r} would each sample their own; train them one after the other.")
    judging.judge(config)
    environments.check(config)
    asked, steps, chosen = config.rollout, rollouts.stride(config), rollouts.estimator(config)
    rollouts.sampling(config)
    for name in ("epochs", "minibatches", "samples_per_prompt", "max_tokens"):
        if asked[name] < 1:
            raise ValueError(f"rollout.{name}: at least 1, not {asked[name]}.")
    if asked.samples_per_prompt < chosen.least:
        raise ValueError(
            f"rollout.samples_per_prompt: {config.algorithm!r} compares at least {chosen.least} samples of a prompt, "
            f"not {asked.samples_per_prompt}."
        )
    if chosen.values and "value_head" not in config.methods:
        raise ValueError(
            f"methods: {config.algorithm!r} learns the values of states, by a head of its own: add 'value_head', as in "
            f"methods={(*config.methods, 'value_head')}."
        )
    _check_choice(config)
    _check_penalty(config)
    _check_unread(config)
    _check_staleness(config)
    _check_correction(config)
    if not rollouts.one_of_each(config) and config.data.batch_size * asked.minibatches % asked.samples_per_prompt:
        raise ValueError(
            f"data.batch_size: {config.data.batch_size} rows × {asked.minibatches} minibatches are no whole number of prompts with "
            f"{asked.samples_per_prompt} samples each; choose a multiple."
        )
    _check_ends(config)
    if asked.max_tokens >= config.data.max_tokens:
        raise ValueError(f"rollout.max_tokens: {asked.max_tokens} leaves no prompt in rows of data.max_tokens={config.data.max_tokens}.")
    durations = {
        "steps": config.steps,
        "eval.every_steps": config.eval.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
    }
    for name, value in durations.items():
        if value > 0 and value % steps:
            raise ValueError(
                f"{name}: {value} is no multiple of the {steps} steps that an experience gives (rollout.epochs={asked.epochs} × "
                f"rollout.minibatches={asked.minibatches}); nearest: {max(steps, round(value / steps) * steps)}."
            )
    _check_packing(config)


def _check_ends(config) -> None:
    """Refuse ends of a sample that none can have."""
    least, texts, most = rollouts.min_tokens(config), rollouts.stop(config), config.rollout.max_tokens
    if not 0 <= least <= most:
        raise ValueError(f"rollout.min_tokens: from 0 to rollout.max_tokens={most}, not {least}.")
    if wrong := refusal(config.rollout.get("stop", ())):
        raise ValueError(f"rollout.stop: {wrong}.")
    if config.rollout.slots < 0:
        raise ValueError(f"rollout.slots: 0, as many as there are samples, or more, not {config.rollout.slots}.")
    if environments.used(config) and (least or texts):
        raise ValueError("rollout.min_tokens, rollout.stop: an episode has turns, which rollout.environment.stop ends; leave these out.")


def _check_packing(config) -> None:
    """Refuse rows that the samples cannot share."""
    packing, group, parts = config.data.packing, config.rollout.samples_per_prompt, config.data.accumulation
    if packing not in ("none", "shared"):
        raise ValueError(f"data.packing: rollouts have a row each ('none') or one for all samples of a prompt ('shared'), not {packing!r}.")
    if packing == "shared" and (objective.needs(config).data != data.ROLLOUTS or rollouts.opposed(config)):
        raise ValueError(f"data.packing: {config.algorithm!r} does not learn from all samples of a prompt, which 'shared' puts in one row.")
    if packing == "shared" and config.data.batch_size % (group * parts):
        raise ValueError(
            f"data.batch_size: {config.data.batch_size} samples do not give each of {parts} micro-batches (data.accumulation) as many "
            f"whole groups of {group}, each of which has a row (data.packing='shared'); choose a multiple of {group * parts}."
        )


def _check_choice(config) -> None:
    """Refuse a choice of samples, or of whom they are compared with, that cannot be meant."""
    asked, chosen = config.rollout, rollouts.estimator(config)
    if chosen.opponents != rollouts.opposed(config):
        raise ValueError(
            f"rollout.advantages: 'preferred' is for what has an opponent (nash_md, xpo), and only that; {config.algorithm!r} has "
            f"{'one' if rollouts.opposed(config) else 'none'}: set it to 'auto'."
        )
    unheard = [name for name in ("kl_penalty", "unfinished_penalty", "reward_bounds") if asked[name]]
    if asked.advantages == "decoupled" and unheard:
        raise ValueError(f"rollout.{unheard[0]}: it acts on the sum of the rewards, and 'decoupled' advantages heed each; leave it out.")
    if objective.asks_once(config):
        raise ValueError("reference.logps: what the policy will write is not known before the run: nothing is 'cached'; set it to 'live'.")
    if rollouts.opposed(config) and config.reference.every_steps:
        raise ValueError(f"reference.every_steps: the opponent of {config.algorithm!r} is where the run began; set it to 0.")
    virtual = [name for name in config.methods if name in peft.SOFT_PROMPTS]
    if objective.needs(config).opponent == "mixture" and virtual:
        raise ValueError(f"methods: the reference has none of the virtual tokens of {virtual[0]!r}, so it cannot be mixed with the policy.")
    if not 0 <= asked.mixture <= 1:
        raise ValueError(f"rollout.mixture: the share of the reference is in [0, 1], not {asked.mixture}.")
    if asked.keep not in KEEP:
        raise ValueError(f"rollout.keep: there is no {asked.keep!r}; nearest: {nearest(asked.keep, KEEP)}.")
    if not rollouts.selected(config):
        return
    if asked.keep_above is None and (asked.keep == "all" or asked.samples_per_prompt < 2):
        raise ValueError(
            f"rollout.keep_above: of {asked.samples_per_prompt} samples of a prompt, of which it keeps {asked.keep!r}, nothing is left "
            "out: say what a sample must be worth."
        )


def _check_penalty(config) -> None:
    """Refuse a penalty for leaving the reference that acts nowhere."""
    asked = config.rollout
    rollouts.divergence(config)
    if asked.kl_penalty and rollouts.opposed(config):
        raise ValueError(f"rollout.kl_penalty: {config.algorithm!r} compares rewards with an opponent's: hold it by loss.beta instead.")
    if asked.kl_target < 0 or (asked.kl_target and not asked.kl_penalty > 0):
        raise ValueError(
            f"rollout.kl_target: {asked.kl_target} nats a sample need a rollout.kl_penalty above 0, with which the coefficient begins; it "
            f"is {asked.kl_penalty}."
        )
    if asked.kl_target and asked.kl_horizon < rollouts.samples(config):
        raise ValueError(f"rollout.kl_horizon: at least the {rollouts.samples(config)} samples of an experience, not {asked.kl_horizon}.")


def _check_unread(config) -> None:
    """Refuse what was set and acts nowhere."""
    for name, option in OPTIONS.items():
        value = config.rollout.get(name, option.default)  # configs of older runs have not all of them
        if value != option.default and not option.read(config):
            raise ValueError(
                f"rollout.{name}: {value!r} acts nowhere with {config.algorithm!r}: it is read by {option.reader}; "
                f"leave it at {option.default!r}."
            )


def _check_staleness(config) -> None:
    """Refuse to learn from samples of an earlier policy as if they were this one's."""
    bound, known = rollouts.staleness(config), inspect.signature(losses.LOSSES[config.algorithm]).parameters
    if bound < 0:
        raise ValueError(f"rollout.staleness: experiences, 0 or more, not {bound}.")
    if bound and jax.process_count() > 1:
        raise ValueError(
            f"rollout.staleness: the {jax.process_count()} processes of a run sample together, and in a thread beside the steps they would "
            f"wait for each other; set it to 0, not {bound}."
        )
    if not bound or objective.needs(config).data != data.ROLLOUTS:  # pairs, and what imitates, ask no sample how likely it was
        return
    if "correction" not in known:
        raise ValueError(f"rollout.staleness: {config.algorithm!r} takes samples for its own; set it to 0, not {bound}.")
    if not config.loss.get("correction"):
        raise ValueError(
            f"loss.correction: with rollout.staleness={bound} the sampler is an earlier policy, and {config.algorithm!r} would take its "
            f"samples for its own; choose one of {', '.join(CORRECTIONS)}, as in base.online({config.algorithm!r}, "
            f"correction={next(iter(CORRECTIONS))!r})."
        )


def _check_correction(config) -> None:
    """Refuse to weigh what a filter drew by how likely it was: it is more likely there, by what was left out, than under the policy."""
    asked = [name for name in ("correction", "off_policy_threshold") if config.loss.get(name) is not None]
    if asked and rollouts.filtered(config):
        raise ValueError(
            f"loss.{asked[0]}: it compares the policy with the sampler, and rollout.top_k, top_p, min_p and min_tokens make the sampler "
            "another distribution: every weight would be below 1, a response's the less the longer it is. Leave the filter or this out."
        )


def check_student(config) -> None:
    """Refuse a `config.student` that cannot write; asked before anything is loaded."""
    share = config.get("student", {}).get("on_policy", 0)
    if not 0 <= share <= 1:
        raise ValueError(f"student.on_policy: the share of the steps is in [0, 1], not {share}.")
    if not objective.on_policy(config):
        return
    asked = config.student
    if objective.teacher_block(config).file:
        raise ValueError("student.on_policy: what a file says is of the text that it was made of; leave teacher.file empty.")
    if config.sweep or jax.process_count() > 1:
        what = "members of a sweep" if config.sweep else f"the {jax.process_count()} processes of a run"
        raise ValueError(f"student.on_policy: {what} would each write their own; set it to 0.")
    if asked.temperature <= 0:
        raise ValueError(f"student.temperature: above 0, not {asked.temperature}.")
    if not 0 < asked.max_tokens < config.data.max_tokens:
        raise ValueError(f"student.max_tokens: from 1 to less than data.max_tokens={config.data.max_tokens}, not {asked.max_tokens}.")
