"""What a config says of rollouts: how many, how they are sampled and scored, and what their advantages are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import data, losses, online, peft, rollout, sharding
from ftjax.cli import environments, judging, objective
from ftjax.losses.correction import CORRECTIONS
from ftjax.online.estimators import ESTIMATORS, Estimator
from ftjax.tree import nearest
from ftjax.types import Batch, Model, Params, Scores, Transform

BY_ALGORITHM = {
    "rloo": "leave_one_out",
    "dr_grpo": "group_centred",
    "reinforce": "leave_one_out",
    "remax": "greedy_baseline",
    "opo": "optimal_baseline",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "ppo": "gae",
    "nash_md": "preferred",
    "xpo": "preferred",
    "rejection_sampling": "rewards",
}
"""The estimator that an algorithm is known with, where it is not `group_relative`."""


def used(config) -> bool:
    """Return whether the run learns from what the policy writes itself: its config has a block `rollout`."""
    return "rollout" in config


def paired(config) -> bool:
    """Return whether the objective compares two samples of a prompt, the best with the worst: online DPO and its family."""
    return objective.needs(config).data == data.PAIRS


def opposed(config) -> bool:
    """Return whether each sample is compared with one of an opponent's, and not with other samples of the policy: XPO, Nash-MD."""
    return bool(objective.needs(config).opponent)


def selected(config) -> bool:
    """Return whether the policy learns from its good samples alone, as if they had been given: rejection sampling."""
    return objective.needs(config).selected


def one_of_each(config) -> bool:
    """Return whether all samples of a prompt become one row: a pair of them, or the best."""
    return (paired(config) and not opposed(config)) or (selected(config) and config.rollout.keep == "best")


def rows(config) -> int:
    """Return the rows of a step: one for each sample, pair or best one, or for all samples of a prompt."""
    shared = used(config) and config.data.packing == "shared"
    return config.data.batch_size // (config.rollout.samples_per_prompt if shared else 1)


def stride(config) -> int:
    """Return the optimiser steps that are taken on one experience: 1 without rollouts."""
    return config.rollout.epochs * config.rollout.minibatches if used(config) else 1


def staleness(config) -> int:
    """Return how many experiences the weights that sample may be older than those that learn: 0 without rollouts."""
    return config.rollout.get("staleness", 0) if used(config) else 0


def prompts(config) -> int:
    """Return the prompts of an experience, whose rows are its samples, or one of each prompt."""
    rows = config.data.batch_size * config.rollout.minibatches
    return rows if one_of_each(config) else rows // config.rollout.samples_per_prompt


def samples(config) -> int:
    """Return the samples of an experience."""
    return prompts(config) * config.rollout.samples_per_prompt


def estimator(config) -> Estimator:
    """Return the estimator of advantages."""
    asked = config.rollout.advantages
    usual = BY_ALGORITHM.get(config.algorithm, "group_centred" if paired(config) else "group_relative")
    name = usual if asked == "auto" else asked
    if name not in ESTIMATORS:
        raise ValueError(f"rollout.advantages: there is no {name!r}; nearest: {nearest(name, ['auto', *ESTIMATORS])}.")
    return ESTIMATORS[name]


def sampling(config) -> rollout.Sampling:
    """Return the settings of `config.rollout`; greedy choices teach nothing of what else could have been written."""
    names = ("temperature", "top_k", "top_p", "min_p")
    if config.rollout.temperature <= 0:
        raise ValueError(f"rollout.temperature: above 0, not {config.rollout.temperature}: all samples of a prompt would be the same.")
    return rollout.settings(**{name: config.rollout[name] for name in names})


def filtered(config) -> bool:
    """Return whether the sampler draws from a part of the distribution, so that it cannot say what the trainer says."""
    asked = sampling(config)
    return not (asked.top_k is None and asked.top_p is None and asked.min_p is None)


def check(config) -> None:
    """Refuse sizes that do not fit together; asked before anything is loaded."""
    wanted = objective.needs(config).data
    if not used(config):
        if wanted == data.ROLLOUTS or opposed(config) or selected(config):
            raise ValueError(f"rollout: {config.algorithm!r} needs a block config.rollout; begin the config with base.online().")
        return
    if wanted not in (data.ROLLOUTS, data.PAIRS) and not selected(config):
        raise ValueError(f"algorithm: {config.algorithm!r} learns from {wanted} and not from rollouts; leave the block config.rollout out.")
    if config.sweep:
        raise ValueError(f"sweep: members of {config.algorithm!r} would each sample their own; train them one after the other.")
    judging.judge(config)
    environments.check(config)
    asked, steps, chosen = config.rollout, stride(config), estimator(config)
    sampling(config)
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
    _check_staleness(config)
    if not one_of_each(config) and config.data.batch_size * asked.minibatches % asked.samples_per_prompt:
        raise ValueError(
            f"data.batch_size: {config.data.batch_size} rows × {asked.minibatches} minibatches are no whole number of prompts with "
            f"{asked.samples_per_prompt} samples each; choose a multiple."
        )
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


def _check_packing(config) -> None:
    """Refuse rows that the samples cannot share."""
    packing, group, parts = config.data.packing, config.rollout.samples_per_prompt, config.data.accumulation
    if packing not in ("none", "shared"):
        raise ValueError(f"data.packing: rollouts have a row each ('none') or one for all samples of a prompt ('shared'), not {packing!r}.")
    if packing == "shared" and (objective.needs(config).data != data.ROLLOUTS or opposed(config)):
        raise ValueError(f"data.packing: {config.algorithm!r} does not learn from all samples of a prompt, which 'shared' puts in one row.")
    if packing == "shared" and config.data.batch_size % (group * parts):
        raise ValueError(
            f"data.batch_size: {config.data.batch_size} samples do not give each of {parts} micro-batches (data.accumulation) as many "
            f"whole groups of {group}, each of which has a row (data.packing='shared'); choose a multiple of {group * parts}."
        )


KEEP = ("best", "all")
"""Which samples of a prompt rejection sampling keeps, of those that are good enough."""


def _check_choice(config) -> None:
    """Refuse a choice of samples, or of whom they are compared with, that cannot be meant."""
    asked, chosen = config.rollout, estimator(config)
    if chosen.opponents != opposed(config):
        raise ValueError(
            f"rollout.advantages: 'preferred' is for what has an opponent (nash_md, xpo), and only that; {config.algorithm!r} has "
            f"{'one' if opposed(config) else 'none'}: set it to 'auto'."
        )
    if objective.asks_once(config):
        raise ValueError("reference.logps: what the policy will write is not known before the run: nothing is 'cached'; set it to 'live'.")
    if opposed(config) and config.reference.every_steps:
        raise ValueError(f"reference.every_steps: the opponent of {config.algorithm!r} is where the run began; set it to 0.")
    virtual = [name for name in config.methods if name in peft.SOFT_PROMPTS]
    if objective.needs(config).opponent == "mixture" and virtual:
        raise ValueError(f"methods: the reference has none of the virtual tokens of {virtual[0]!r}, so it cannot be mixed with the policy.")
    if not 0 <= asked.mixture <= 1:
        raise ValueError(f"rollout.mixture: the share of the reference is in [0, 1], not {asked.mixture}.")
    if asked.keep not in KEEP:
        raise ValueError(f"rollout.keep: there is no {asked.keep!r}; nearest: {nearest(asked.keep, KEEP)}.")
    if not selected(config):
        return
    if asked.keep_above is None and (asked.keep == "all" or asked.samples_per_prompt < 2):
        raise ValueError(
            f"rollout.keep_above: of {asked.samples_per_prompt} samples of a prompt, of which it keeps {asked.keep!r}, nothing is left "
            "out: say what a sample must be worth."
        )


def _check_penalty(config) -> None:
    """Refuse a penalty for leaving the reference that acts nowhere."""
    asked = config.rollout
    if asked.kl_penalty and opposed(config):
        raise ValueError(f"rollout.kl_penalty: {config.algorithm!r} compares rewards with an opponent's: hold it by loss.beta instead.")
    if asked.kl_target < 0 or (asked.kl_target and not asked.kl_penalty > 0):
        raise ValueError(
            f"rollout.kl_target: {asked.kl_target} nats a sample need a rollout.kl_penalty above 0, with which the coefficient begins; it "
            f"is {asked.kl_penalty}."
        )
    if asked.kl_target and asked.kl_horizon < samples(config):
        raise ValueError(f"rollout.kl_horizon: at least the {samples(config)} samples of an experience, not {asked.kl_horizon}.")


def _check_staleness(config) -> None:
    """Refuse to learn from samples of an earlier policy as if they were this one's."""
    bound, known = staleness(config), inspect.signature(losses.LOSSES[config.algorithm]).parameters
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
            f"samples for its own; choose one of {', '.join(CORRECTIONS)}."
        )


def rows_of(config) -> Callable[[Batch, np.ndarray], Batch] | None:
    """Return how samples `[p · g, t]` and what they are worth `[p, g]` become a batch; None where that is all of them, with advantages."""
    if selected(config):
        return partial(online.best if config.rollout.keep == "best" else online.above, least=config.rollout.keep_above)
    return online.pairs if paired(config) and not opposed(config) else None


def referred(config) -> bool:
    """Return whether the run compares the policy with where it began."""
    live = objective.needs(config).reference and not paired(config)  # of pairs it speaks in every step
    return used(config) and bool(config.loss.get("kl_coef", 0.0) or config.rollout.kl_penalty or live)


def sampler(config, model: Model, mesh: Mesh, encoder: data.Encoder, *, mixture: float | None = None) -> online.Sampler:
    """Return how prompts are answered: by one engine, whose programs are compiled once for the whole run.

    With a `mixture` the parameters are those of `rollout.both`, and it is the share of the reference.
    """
    model = sharding.on_mesh(model, mesh)
    model = model if mixture is None else rollout.geometric(model, share=mixture)
    template = encoder.template.source if encoder.template else "none"
    engine = rollout.Engine(
        model,
        rollout.Encoder(model, encoder.tokenizer, template=template).eos_ids,
        slots=config.rollout.slots or samples(config),
        tokenizer=encoder.tokenizer,
        slot_tokens=config.data.max_tokens,
    )
    if environments.used(config):
        return environments.sampler(config, engine, encoder, sampling(config))
    return online.sampler(engine, max_tokens=config.rollout.max_tokens, sampling=sampling(config))


def scorer(config, model: Model, method: Transform, mesh: Mesh, *, temperature: float) -> Callable[[Params, Params, Batch], Scores]:
    """Return the jitted `(trainable, frozen, batch) -> scores` of the policy as a training step would find them, dropout off."""
    outputs = ("logps", "values") if estimator(config).values else ("logps",)
    look = partial(objective.score(config, model, mesh, outputs), temperature=temperature)
    return jax.jit(lambda trainable, frozen, batch: look(method.attach(frozen, trainable), batch))


def reference_scorer(config, model: Model, mesh: Mesh) -> Callable[[Params, Batch], Scores]:
    """Return the jitted `(frozen, batch) -> scores` of the reference."""
    look = objective.score(config, model, mesh, ("logps",))
    return jax.jit(lambda frozen, batch: look(peft.reference(frozen), batch))


def advantages(config) -> Callable[[online.Evidence], online.Worth]:
    """Return the jitted estimator."""
    chosen = estimator(config)
    options = {"gamma": config.rollout.gamma, "lam": config.rollout.lam} if chosen.values else {}
    return jax.jit(partial(chosen.estimate, **options))
