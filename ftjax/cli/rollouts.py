"""What a config says of rollouts: how many, how they are sampled and scored, and what their advantages are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import data, online, peft, rollout, sharding
from ftjax.cli import environments, objective
from ftjax.losses.kl import KL_ESTIMATORS
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

DIVERGENCES = ("k1", "k2", "k3")
"""Of `losses.kl`: the others differ from these in their gradients alone, and a reward has none."""


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


def stop(config) -> tuple[str, ...]:
    """Return the texts that end a sample, beside its end-of-turn token; configs of older runs have none."""
    return tuple(config.rollout.get("stop", ()))


def min_tokens(config) -> int:
    """Return how many tokens a sample has before it may end; 0 for configs of older runs."""
    return config.rollout.get("min_tokens", 0)


def filtered(config) -> bool:
    """Return whether the sampler draws from a part of the distribution, so that it cannot say what the trainer says."""
    asked = sampling(config)
    return not (asked.top_k is None and asked.top_p is None and asked.min_p is None and not min_tokens(config))


def rows_of(config) -> Callable[[Batch, np.ndarray], Batch] | None:
    """Return how samples `[p · g, t]` and what they are worth `[p, g]` become a batch; None where that is all of them, with advantages."""
    if selected(config):
        return partial(online.best if config.rollout.keep == "best" else online.above, least=config.rollout.keep_above)
    return online.pairs if paired(config) and not opposed(config) else None


def referred(config) -> bool:
    """Return whether the run compares the policy with where it began."""
    if not used(config):
        return False
    live = objective.needs(config).reference and not paired(config)  # of pairs it speaks in every step
    return bool(config.loss.get("kl_coef", 0.0) or config.rollout.kl_penalty or config.rollout.get("report_kl", False) or live)


def unwatched(config) -> bool:
    """Return whether no metric says how far the policy is from where it began, though `rollout.report_kl` could."""
    return used(config) and objective.needs(config).data == data.ROLLOUTS and not referred(config)


def divergence(config) -> Callable[[jax.Array], jax.Array]:
    """Return what is taken from the reward of a token for its log-ratio to the reference."""
    name = config.rollout.kl_estimator
    if name not in DIVERGENCES:
        raise ValueError(f"rollout.kl_estimator: there is no {name!r}; nearest: {nearest(name, DIVERGENCES)}.")
    return KL_ESTIMATORS[name]


def sampler(
    config,
    model: Model,
    mesh: Mesh,
    encoder: data.Encoder,
    *,
    mixture: float | None = None,
    going: Callable[[], None] | None = None,
) -> online.Sampler:
    """Return how prompts are answered: by one engine, whose programs are compiled once for the whole run.

    With a `mixture` the parameters are those of `rollout.both`, and it is the share of the reference. `going` is the engine's.
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
        going=going,
    )
    if environments.used(config):
        return environments.sampler(config, engine, encoder, sampling(config))
    ends = {"max_tokens": config.rollout.max_tokens, "min_tokens": min_tokens(config), "stop": stop(config)}
    return online.sampler(engine, sampling=sampling(config), **ends)


def scorer(config, model: Model, method: Transform, mesh: Mesh, *, temperature: float) -> Callable[[Params, Params, Batch], Scores]:
    """Return the jitted `(trainable, frozen, batch) -> scores` of the policy as a training step would find them, dropout off."""
    outputs = ("logps", "values") if estimator(config).values else ("logps",)
    look = partial(objective.score(config, model, mesh, outputs), temperature=temperature)
    return jax.jit(lambda trainable, frozen, batch: look(method.attach(frozen, trainable), batch))


def reference_scorer(config, model: Model, mesh: Mesh) -> Callable[[Params, Batch], Scores]:
    """Return the jitted `(frozen, batch) -> scores` of the reference, at the temperature of the policy."""
    look = partial(objective.score(config, model, mesh, ("logps",)), temperature=config.rollout.temperature)
    return jax.jit(lambda frozen, batch: look(peft.reference(frozen), batch))


def advantages(config) -> Callable[[online.Evidence], online.Worth]:
    """Return the jitted estimator."""
    chosen = estimator(config)
    return jax.jit(partial(chosen.estimate, **{name: config.rollout[name] for name in chosen.options}))
