"""Train every objective at several β on bandits drawn by seed, and write what came out.

Usage: python -m experiments.preference_frontier.run RESULTS.json
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.preference_frontier import bandit as tables
from experiments.preference_frontier import online
from experiments.preference_frontier.bandit import Bandit
from ftjax import losses, peft, train
from ftjax.types import Batch, LossFn, Params

SEEDS, CONTEXTS, ARMS = 5, 16, 16
PAIRS = 2048
GROUP = 16
"""Responses to each context that an online step draws."""
OFFLINE_STEPS, ONLINE_STEPS = 2000, 500
RATE = 0.1
BETAS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
NUMBERS = (2, 4, 8, 16, 32, 64)
"""Of which a reward model takes the best."""

OFFLINE: dict[str, tuple[Callable[..., LossFn], tuple[float, ...]]] = {
    "DPO": (lambda beta: partial(losses.dpo, beta=beta), BETAS),
    "IPO": (lambda beta: partial(losses.LOSSES["ipo"], beta=beta), tuple(beta / 4 for beta in BETAS)),
    "KTO": (lambda beta: partial(kto, beta=beta), BETAS),
    "ORPO": (lambda beta: partial(losses.orpo, beta=beta), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
}


def kto(scores, pairs: Batch, *, beta: float):
    """KTO of the responses of pairs, one by one, and mismatched ones drawn from all contexts' alike: here they are these responses."""
    scores, rows = tables.singles(scores, pairs)
    return losses.kto(scores, losses.with_baseline(rows, losses.kl_baseline(scores, rows)), beta=beta)


def make_bandit(key: jax.Array) -> Bandit:
    """Draw rewards with a standard deviation of 1, and a reference that knows nothing of them."""
    rewards, reference = jax.random.normal(key, (2, CONTEXTS, ARMS))
    return Bandit(rewards, jax.nn.log_softmax(reference))


def make_pairs(key: jax.Array, bandit: Bandit) -> Batch:
    """Draw two arms of the reference in random contexts, and the preferred one by Bradley–Terry."""
    where, which, label = jax.random.split(key, 3)
    contexts = jax.random.randint(where, (PAIRS,), 0, CONTEXTS)
    arms = jax.lax.top_k(bandit.reference[contexts] + jax.random.gumbel(which, (PAIRS, ARMS)), 2)[1]  # two without replacement
    first, second = jnp.take_along_axis(bandit.rewards[contexts], arms, axis=1).T
    right = jax.random.uniform(label, (PAIRS,)) < jax.nn.sigmoid(first - second)
    arms = jnp.where(right[:, None], arms, arms[:, ::-1])
    return tables.batch(bandit, jnp.stack([contexts, contexts], axis=1), arms)


def learn(key: jax.Array, bandit: Bandit, loss: LossFn, batch_of: Callable[[jax.Array, Params], Batch], *, steps: int) -> Params:
    """Return the tables after so many steps; `batch_of(key, tables)` is what a step learns from."""
    method, optimizer = peft.full(".*"), optax.adam(optax.cosine_decay_schedule(RATE, steps))
    frozen, trainable = method.init(key, tables.start(bandit))
    step = train.make_train_step(tables.score, method, loss, optimizer)

    def advance(state, key):
        return step(state, frozen, batch_of(key, method.attach(frozen, state.trainable)))[0], None

    state, _ = jax.lax.scan(advance, train.init_state(key, trainable, method, optimizer), jax.random.split(key, steps))
    return method.attach(frozen, state.trainable)


def learn_offline(key: jax.Array, bandit: Bandit, pairs: Batch, loss: LossFn) -> Params:
    return learn(key, bandit, loss, lambda *_: pairs, steps=OFFLINE_STEPS)


def learn_online(key: jax.Array, bandit: Bandit, objective: online.Online) -> Params:
    def batch_of(key: jax.Array, params: Params) -> Batch:
        draw = lambda logps: jax.random.categorical(key, logps[:, None], axis=-1, shape=(CONTEXTS, GROUP))  # noqa: E731
        return online.rollout(objective, bandit, params, draw)

    return learn(key, bandit, objective.loss, batch_of, steps=ONLINE_STEPS)


def policies(keys: jax.Array, bandits: Bandit, pairs: Batch) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yield (method, what it varies, log-probabilities `[seeds, contexts, arms]`)."""
    cheap = {"xla_backend_optimization_level": 0}  # it takes longer to compile than to run
    together = lambda function: jax.jit(jax.vmap(function), compiler_options=cheap)  # noqa: E731
    logps = lambda found: np.asarray(jax.nn.log_softmax(found["policy"]["kernel"]), np.float64)  # noqa: E731
    for name, (loss_at, betas) in OFFLINE.items():
        for beta in betas:
            yield name, beta, logps(together(partial(learn_offline, loss=loss_at(beta)))(keys, bandits, pairs))
    judge = together(partial(learn_offline, loss=losses.bradley_terry))(keys, bandits, pairs)
    learnt = bandits._replace(rewards=judge["values"]["arms"])
    for number in NUMBERS:
        judged = np.asarray(learnt.rewards, np.float64)
        yield (
            "reward model, best of n",
            number,
            np.stack([one.best_of(number, scores) for one, scores in zip(apart(bandits), judged, strict=True)]),
        )
    for beta in BETAS:
        for name, objective in online.objectives(beta).items():
            run = together(partial(learn_online, objective=objective))
            yield name, beta, logps(run(keys, bandits))
            if name == "RLOO":
                yield "reward model, RLOO", beta, logps(run(keys, learnt))


def apart(bandits: Bandit) -> list[Bandit]:
    """Return the bandits one by one, in float64."""
    return [Bandit(*(np.asarray(x[seed], np.float64) for x in bandits)) for seed in range(len(bandits.rewards))]


def main() -> None:
    drawing, learning = (jax.vmap(jax.random.key)(np.arange(SEEDS) + shift) for shift in (0, 1000))
    bandits = jax.vmap(make_bandit)(drawing)
    pairs = jax.jit(jax.vmap(make_pairs))(jax.vmap(partial(jax.random.fold_in, data=1))(drawing), bandits)
    rows, worlds = [], apart(bandits)
    for name, varied, found in policies(learning, bandits, pairs):
        points = [point(world, policy) for world, policy in zip(worlds, found, strict=True)]
        rows.append({"method": name, "at": varied} | {what: [one[what] for one in points] for what in points[0]})
        print(f"{name} at {varied:g}: KL {np.mean(rows[-1]['kl']):.3f}, gain {np.mean(rows[-1]['gain']):.3f}", flush=True)
    curve = [[point(world, world.optimum(beta)) for beta in np.geomspace(0.05, 20, 60)] for world in worlds]
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"rows": rows, "optimum": curve}))


def point(world: Bandit, policy: np.ndarray) -> dict[str, float]:
    """Return how far a policy is from the reference, what reward it gains over it, and how much less that is than could be had there."""
    kl, gain = world.kl(policy), world.reward(policy) - world.reward(world.reference)
    return {"kl": kl, "gain": gain, "short": world.reward(best_at(world, kl)) - world.reward(policy)}


def best_at(world: Bandit, kl: float) -> np.ndarray:
    """Return the policy of the most reward at a divergence: the optimum at some β, which is found by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(50):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if world.kl(world.optimum(middle)) > kl else (low, middle)
    return world.optimum(high)


if __name__ == "__main__":
    main()
