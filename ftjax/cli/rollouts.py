"""What a config says of rollouts: how many, how they are sampled and scored, and what their advantages are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from ftjax import data, losses, online, peft, rollout, sharding
from ftjax.cli import judging, objective
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
}
"""The estimator that an algorithm is known with, where it is not `group_relative`."""


def used(config) -> bool:
    """Return whether the run learns from what the policy writes itself: its config has a block `rollout`."""
    return "rollout" in config


def paired(config) -> bool:
    """Return whether the objective compares two samples of a prompt, the best with the worst: online DPO and its family."""
    return objective.needs(config).data == data.PAIRS


def stride(config) -> int:
    """Return the optimiser steps that are taken on one experience: 1 without rollouts."""
    return config.rollout.epochs * config.rollout.minibatches if used(config) else 1


def prompts(config) -> int:
    """Return the prompts of an experience, whose rows are its samples, or a pair of each prompt."""
    rows = config.data.batch_size * config.rollout.minibatches
    return rows if paired(config) else rows // config.rollout.samples_per_prompt


def samples(config) -> int:
    """Return the samples of an experience."""
    return prompts(config) * config.rollout.samples_per_prompt


def estimator(config) -> Estimator:
    """Return the estimator of advantages."""
    asked = config.rollout.advantages
    usual = "group_centred" if paired(config) else BY_ALGORITHM.get(config.algorithm, "group_relative")
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
        if wanted == data.ROLLOUTS:
            raise ValueError(f"rollout: {config.algorithm!r} needs a block config.rollout; begin the config with base.online().")
        return
    if wanted not in (data.ROLLOUTS, data.PAIRS):
        raise ValueError(f"algorithm: {config.algorithm!r} learns from {wanted} and not from rollouts; leave the block config.rollout out.")
    if config.algorithm not in (*losses.POLICY_LOSSES, "ppo") and not paired(config):
        raise ValueError(f"algorithm: the opponents of {config.algorithm!r} are not sampled by `ftjax train` yet; use it from Python.")
    if config.sweep:
        raise ValueError(f"sweep: members of {config.algorithm!r} would each sample their own; train them one after the other.")
    if jax.process_count() > 1:
        raise ValueError(f"algorithm: {config.algorithm!r} samples on the devices of one process; there are {jax.process_count()}.")
    judging.judge(config)
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
    if not paired(config) and config.data.batch_size * asked.minibatches % asked.samples_per_prompt:
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
    if config.data.packing != "none":
        raise ValueError(f"data.packing: rollouts have a row each: say 'none', not {config.data.packing!r}.")


def referred(config) -> bool:
    """Return whether the run compares the policy with where it began."""
    live = objective.needs(config).reference and not paired(config)  # of pairs it speaks in every step
    return used(config) and bool(config.loss.get("kl_coef", 0.0) or config.rollout.kl_penalty or live)


def sampler(config, model: Model, mesh: Mesh, encoder: data.Encoder) -> online.Sampler:
    """Return how prompts are answered: by one engine, whose programs are compiled once for the whole run."""
    template = encoder.template.source if encoder.template else "none"
    engine = rollout.Engine(
        sharding.on_mesh(model, mesh),
        rollout.Encoder(model, encoder.tokenizer, template=template).eos_ids,
        slots=config.rollout.slots or samples(config),
        slot_tokens=config.data.max_tokens,
    )
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
