"""Whom the policy is compared with where its objective asks for an opponent: its reference, or a mixture of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from ftjax import data, peft, rollout
from ftjax.cli import objective, rollouts
from ftjax.cli.hindsight import Actor
from ftjax.rollout import Sample
from ftjax.types import Params

Opponent = Callable[[Params, Sequence[data.Prompt], jax.Array], list[Sample]]
"""`(trainable, prompts, keys [p, g]) -> samples`, as those of an `online.Sampler`."""


def opponent(config, actor: Actor, mesh: Mesh, encoder: data.Encoder, *, going: Callable[[], None] | None = None) -> Opponent | None:
    """Return what answers the prompts beside the policy; None where nobody does.

    The reference is the frozen tree, and with the policy it makes the mixture of Nash-MD: no second model is loaded for either. `going` is
    the engine's.
    """
    against = objective.needs(config).opponent
    if not against:
        return None
    share = config.rollout.mixture if against == "mixture" else None
    sample = rollouts.sampler(config, actor.model, mesh, encoder, mixture=share, going=going)

    def answer(trainable: Params, prompts: Sequence[data.Prompt], keys: jax.Array) -> list[Sample]:
        reference = peft.reference(actor.frozen)
        if share is None:
            return sample(reference, prompts, keys)
        return sample(rollout.both(actor.method.attach(actor.frozen, trainable), reference), prompts, keys)

    return answer
