"""PPO as three systems define it: their definitions in our words, in NumPy's float64, beside ftjax by value and by gradient.

TRL 1.12 (`PPOTrainer`, the last version that has it), and of 2026's main branches verl (`compute_policy_loss_vanilla`,
`compute_value_loss`, `agg_loss`, `kl_penalty`, `compute_gae_advantage_return`) and NeMo RL (`ClippedPGLossFn`, `MseValueLossFn`,
`GeneralizedAdvantageEstimator`). verl and NeMo RL train two networks by two losses, which are added here. Not compared is:

- TRL's means of a micro-batch, and NeMo RL's 1e-8 in denominators;
- verl's bounds of ±20 on log-ratios, where ftjax goes on straight above 20; the end of a divergence at 10 (verl's k3, NeMo RL's by
  default), where ftjax has none;
- what ftjax has not: verl's `abs`, `token-sum`, weights divided by their mean, and a c below 1 + ε_high; NeMo RL's
  `use_on_policy_kl_approximation`, `seq-mask-tis`, NLL of good responses (VAPO) and two λ in one call;
- NeMo RL's whitening.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.losses import advantages, shaping
from ftjax.losses.kl import KL_ESTIMATORS
from ftjax.online.estimators import ESTIMATORS, Evidence
from ftjax.types import Scores
from tests.losses.examples import T, make_problem

PPO, GRADIENT = losses.ppo, losses.policy_gradient
HELD = np.real
"""The gradients of definitions are taken by a complex step, which is exact to rounding: what has no imaginary part has no gradient."""


class Rollouts(NamedTuple):
    """What a definition reads, each `[b, t]`; values are those of the states that tokens were drawn in."""

    logps: Any
    values: Any
    old: Any
    behavior: Any
    reference: Any
    advantages: Any
    old_values: Any
    returns: Any
    mask: Any


def mean(x, mask):
    return np.sum(x * mask) / np.sum(mask)


def row_means(x, mask):
    """The mean over responses of their means over tokens."""
    rows = mask[mask.any(1)]
    return np.mean(np.sum(x[mask.any(1)] * rows, 1) / np.sum(rows, 1))


def trl(x, *, cliprange, cliprange_value, vf_coef):
    ratio = np.exp(x.logps - x.old)
    policy = np.maximum(-x.advantages * ratio, -x.advantages * np.clip(ratio, 1 - cliprange, 1 + cliprange))
    moved = np.clip(x.values, x.old_values - cliprange_value, x.old_values + cliprange_value)
    errors = np.maximum((x.values - x.returns) ** 2, (moved - x.returns) ** 2)
    return mean(policy, x.mask) + vf_coef * 0.5 * mean(errors, x.mask)


AGGREGATIONS = {
    "token-mean": mean,
    "seq-mean-token-mean": row_means,
    "seq-mean-token-sum": lambda x, mask: np.sum(x * mask) / np.sum(mask.any(1)),
    "seq-mean-token-sum-norm": lambda x, mask: np.sum(x * mask) / np.sum(mask.any(1)) / mask.shape[1],
}


def estimate(logratio, kind):
    return {"k1": logratio, "k2": logratio**2 / 2, "k3": np.exp(-logratio) - 1 + logratio}[kind]


def kl_penalty(logratio, kind):
    """A "+" has the value of its estimator and the gradient of k2."""
    value = estimate(logratio, kind.rstrip("+"))
    return value if "+" not in kind else HELD(value) + estimate(logratio, "k2") - HELD(estimate(logratio, "k2"))


def verl(
    x, *, low, high, c, loss_agg_mode="token-mean", cliprange_value=0.5, kl_loss_coef=0.0, kl_loss_type="k3", rollout_is=None, bounds=()
):
    """`bounds` of the weights: the largest, or the least and the largest that are kept."""
    aggregate, ratio = partial(AGGREGATIONS[loss_agg_mode], mask=x.mask), np.exp(x.logps - x.old)
    clipped = np.maximum(-x.advantages * ratio, -x.advantages * np.clip(ratio, 1 - low, 1 + high))
    policy = np.where(x.advantages < 0, np.minimum(clipped, -x.advantages * c), clipped)
    if rollout_is:
        logratio = (x.old - x.behavior) * x.mask
        weights = np.exp(logratio if rollout_is == "token" else np.sum(logratio, 1, keepdims=True))
        policy = policy * (np.minimum(weights, *bounds) if len(bounds) == 1 else icepop(weights, *bounds))
    moved = np.clip(x.values, x.old_values - cliprange_value, x.old_values + cliprange_value)
    errors = np.maximum((x.values - x.returns) ** 2, (moved - x.returns) ** 2)
    return aggregate(policy) + kl_loss_coef * aggregate(kl_penalty(x.logps - x.reference, kl_loss_type)) + 0.5 * aggregate(errors)


def icepop(weights, least, most):
    return np.where((weights >= least) & (weights <= most), weights, 0)


def nemo(
    x,
    *,
    low,
    high,
    c=None,
    kl=0.0,
    kl_type="k3",
    token_level=True,
    sequence_ratio=False,
    ratio="ppo",
    sampled=None,
    bounds=(),
    scale=0.0,
    cliprange=None,
):
    """`ratio`: "ppo", "cispo", "on_policy" for 1, "none" for log π in its place; `sampled`: the kind of weights against the sampler."""
    reduce = mean if token_level else row_means
    logratio = HELD(x.logps) - x.old if ratio == "cispo" else x.logps - (HELD(x.logps) if ratio == "on_policy" else x.old)
    if sequence_ratio:
        logratio = np.sum(logratio * x.mask, 1, keepdims=True) / np.maximum(np.sum(x.mask, 1, keepdims=True), 1) + 0 * x.mask
    ratios = x.logps if ratio == "none" else np.exp(logratio)
    within = np.clip(ratios, 1 - low, 1 + high) if ratio in ("ppo", "cispo") else ratios
    policy = -x.advantages * within * x.logps if ratio == "cispo" else np.maximum(-x.advantages * ratios, -x.advantages * within)
    if c is not None:
        policy = np.where(x.advantages < 0, np.minimum(policy, -x.advantages * c), policy)
    if sampled:
        gap = (x.old - x.behavior) * x.mask
        weights = np.exp(np.sum(gap, 1, keepdims=True) if sequence_ratio else gap)
        policy = policy * {"all": lambda w: w, "tis": np.minimum, "icepop": icepop}[sampled](weights, *bounds)
    divergence = estimate(x.logps - x.reference, kl_type)
    return reduce(policy, x.mask) + kl * reduce(divergence, x.mask) + scale * nemo_value(x, cliprange=cliprange)


def nemo_value(x, *, cliprange):
    errors = (x.values - x.returns) ** 2
    if cliprange:
        errors = np.maximum(errors, (np.clip(x.values, x.old_values - cliprange, x.old_values + cliprange) - x.returns) ** 2)
    return 0.5 * mean(errors, x.mask)


CLIPS, C = {"clip_low": 0.2, "clip_high": 0.28}, 1.8
VERL = CLIPS | {"ratio_cap": C, "value_coef": 1.0, "value_clip": 0.5}
KL = {"kl_coef": 0.3, "kl_weighted": False}
CAP, FLOOR = 2.0, 0.5
verl, nemo = partial(verl, low=0.2, high=0.28, c=C), partial(nemo, low=0.2, high=0.28)
REDUCTIONS = dict(zip(AGGREGATIONS, ("token_mean", "sequence_mean", "sequence_sum", "constant_length"), strict=True))

CASES = {
    "TRL": (
        partial(PPO, clip_low=0.2, clip_high=0.2, value_coef=0.7, value_clip=0.4),
        partial(trl, cliprange=0.2, cliprange_value=0.4, vf_coef=0.7),
    ),
    **{
        f"verl, {mode}": (
            partial(PPO, **VERL, **KL, reduction=reduction, max_tokens=T if reduction == "constant_length" else None),
            partial(verl, loss_agg_mode=mode, kl_loss_coef=0.3),
        )
        for mode, reduction in REDUCTIONS.items()
    },
    **{
        f"verl, {kind}": (partial(PPO, **VERL, **KL, kl=kind), partial(verl, kl_loss_coef=0.3, kl_loss_type=kind))
        for kind in ("k1", "k2", "k1+", "k3+")
    },
    **{
        f"verl, {level} {name}": (
            partial(PPO, **VERL, correction=f"{level}_{name}", correction_cap=CAP, correction_floor=0.0 if name == "truncate" else FLOOR),
            partial(verl, rollout_is=level, bounds=bounds),
        )
        for level in ("token", "sequence")
        for name, bounds in {"truncate": (CAP,), "mask": (FLOOR, CAP)}.items()
    },
    "NeMo RL": (
        partial(PPO, **CLIPS, **KL, ratio_cap=C, value_coef=0.7, value_clip=0.4),
        partial(nemo, c=C, kl=0.3, scale=0.7, cliprange=0.4),
    ),
    "NeMo RL, values without a clip": (
        partial(PPO, **CLIPS, value_coef=0.7, value_clip=None),
        partial(nemo, scale=0.7, cliprange=None),
    ),
    **{
        f"NeMo RL, sampled {kind}": (
            partial(PPO, **CLIPS, value_coef=0.0, correction=f"token_{name}", correction_cap=cap, correction_floor=floor),
            partial(nemo, sampled=kind, bounds=bounds),
        )
        for kind, name, cap, floor, bounds in (
            ("all", "truncate", np.inf, 0.0, ()),
            ("tis", "truncate", CAP, 0.0, (CAP,)),
            ("icepop", "mask", CAP, FLOOR, (FLOOR, CAP)),
        )
    },
    "NeMo RL, by responses": (
        partial(GRADIENT, **CLIPS, **KL, kl="k2", ratio_cap=C, reduction="sequence_mean"),
        partial(nemo, c=C, kl=0.3, kl_type="k2", token_level=False),
    ),
    "NeMo RL, ratios of responses": (
        partial(GRADIENT, **CLIPS, **KL, level="sequence", correction="sequence_truncate", correction_cap=np.inf),
        partial(nemo, kl=0.3, token_level=False, sequence_ratio=True, sampled="all"),
    ),
    "NeMo RL, CISPO": (partial(GRADIENT, **CLIPS, surrogate="cispo", reduction="token_mean"), partial(nemo, ratio="cispo")),
    "NeMo RL, on policy": (partial(GRADIENT, reduction="token_mean"), partial(nemo, ratio="on_policy")),
    "NeMo RL, without a ratio": (partial(GRADIENT, surrogate="unclipped", reduction="token_mean"), partial(nemo, ratio="none")),
}
FIRST_STEP = {"NeMo RL, on policy", "NeMo RL, without a ratio"}
"""Where ftjax is not told what the policy said before."""
OTHER_VALUE = {"NeMo RL, without a ratio"}
"""-A log π, where ftjax has -ρA with ρ = 1: of one gradient."""


@pytest.fixture(scope="module")
def problem():
    scores, batch = make_problem("rollouts", np.float64)
    signed = np.random.default_rng(1).uniform(-1, 1, batch.loss_mask.shape)
    return scores, dataclasses.replace(batch, advantages=signed)


def read(scores, batch):
    """What definitions read of them."""
    before = lambda x: np.pad(x[:, :-1], ((0, 0), (1, 0)))  # noqa: E731
    return Rollouts(
        logps=scores.logps,
        values=before(scores.values),
        old=batch.old_logps,
        behavior=batch.behavior_logps,
        reference=batch.reference_logps,
        advantages=batch.advantages,
        old_values=before(batch.old_values),
        returns=batch.returns,
        mask=batch.loss_mask,
    )


def in_float64(evaluate, *given):
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(evaluate)(*given))


@pytest.fixture(scope="module")
def found(problem):
    """Value and gradient in log-probabilities and values of every case, in one program."""

    def one(name, scores, batch):
        batch = dataclasses.replace(batch, old_logps=None) if name in FIRST_STEP else batch

        def loss(logps, values):
            said, _ = CASES[name][0](Scores(logps, values=values), batch)
            return said.total / said.weight

        return jax.value_and_grad(loss, (0, 1))(scores.logps, scores.values)

    return in_float64(lambda *given: {name: one(name, *given) for name in CASES}, *problem)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_definition(name, found, problem):
    scores, batch = problem
    definition = CASES[name][1]
    given = lambda logps, values: read(Scores(logps, values=values), batch)  # noqa: E731
    value, gradients = found[name]
    if name not in OTHER_VALUE:
        np.testing.assert_allclose(value, definition(given(scores.logps, scores.values)), rtol=1e-12)
    steps = 1e-30j * np.eye(scores.logps.size).reshape(-1, *scores.logps.shape)
    expected = (
        [definition(given(scores.logps + step, scores.values + 0j)).imag / 1e-30 for step in steps],
        [definition(given(scores.logps + 0j, scores.values + step)).imag / 1e-30 for step in steps],
    )
    for gradient, slopes in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, np.reshape(slopes, gradient.shape), rtol=1e-10, atol=1e-14)
    assert np.abs(gradients[0]).max() > 0.01


def test_the_problem_is_on_every_side_of_every_bound(problem):
    """Otherwise a definition could differ unseen."""
    x = read(*problem)
    at = x.mask > 0
    ratio, weights, values = (v[at] for v in (np.exp(x.logps - x.old), np.exp(x.old - x.behavior), x.values - x.old_values))
    good = x.advantages[at] > 0
    for where in (ratio < 0.8, (ratio > 0.8) & (ratio < 1.28), ratio > 1.28):
        assert (where & good).any() and (where & ~good).any()
    assert ((ratio > C) & ~good).any() and ((ratio > C) & good).any()
    assert (weights < FLOOR).any() and ((weights > FLOOR) & (weights < CAP)).any() and (weights > CAP).any()
    towards = (x.returns - x.old_values)[at] * values > 0
    for clip in (0.4, 0.5):
        assert ((np.abs(values) > clip) & towards).any() and ((np.abs(values) > clip) & ~towards).any() and (np.abs(values) < clip).any()
    products = np.exp(np.sum((x.old - x.behavior) * x.mask, 1))[at.any(1)]
    assert (products < FLOOR).any() and (products > CAP).any()


def test_the_share_that_is_clipped_is_that_of_all_three(problem):
    """They count where the clipped loss is the larger, and beyond c by itself."""
    scores, batch = problem
    x = read(scores, batch)
    ratio = np.exp(x.logps - x.old)
    share = mean(-x.advantages * np.clip(ratio, 0.8, 1.28) > -x.advantages * ratio, x.mask)
    _, metrics = in_float64(partial(PPO, **VERL), scores, batch)
    assert metrics["clip/low"].value() + metrics["clip/high"].value() == pytest.approx(share) and share > 0
    assert metrics["clip/cap"].value() == pytest.approx(mean((ratio > C) & (x.advantages < 0), x.mask))


def test_a_divergence_is_not_cut_at_10():
    """verl and NeMo RL say 10 from x = -2.6 on, and pull no more."""
    value, slope = jax.value_and_grad(lambda x: KL_ESTIMATORS["k3"](x[None])[0])(jnp.float32(-3))
    assert value == pytest.approx(np.exp(3) - 4) and value > 10 and slope == pytest.approx(1 - np.exp(3))


def whitened(x, mask, *, shift_mean=True):
    chosen = x[mask > 0]
    scaled = (x - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
    return (scaled + (0 if shift_mean else chosen.mean())) * mask


def looped(rewards, values, mask, *, gamma, lam):
    """Advantages and returns from the last token to the first; where the mask is 0, what was carried is carried on."""
    after, advantage, found = np.zeros(len(mask)), np.zeros(len(mask)), np.zeros(mask.shape)
    for t in reversed(range(mask.shape[1])):
        here = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * advantage
        advantage = np.where(mask[:, t] > 0, here, advantage)
        after = np.where(mask[:, t] > 0, values[:, t], after)
        found[:, t] = advantage
    return found * mask, (found + values) * mask


class Sampled(NamedTuple):
    """Six responses in a room of five tokens, each after one token of a prompt, whose value is that of the first state."""

    scores: np.ndarray
    ended: np.ndarray
    logratio: np.ndarray
    values: np.ndarray


@pytest.fixture(scope="module")
def sampled():
    draw = np.random.default_rng(2)
    return Sampled(draw.normal(size=6), np.array([1, 0, 1, 1, 0, 1]), *draw.normal(size=(2, 6, 5)))


def trl_worth(x, lengths, *, kl_coef, kl_estimator, gamma, lam, whiten_rewards, missing_eos_penalty):
    """`PPOTrainer`'s advantages, returns, and the metrics non_score_reward and rlhf_reward of each response."""
    at, room = np.arange(x.values.shape[1]), x.values.shape[1]
    mask, longer = (at < lengths[:, None]).astype(float), (at <= lengths[:, None]).astype(float)
    scores = x.scores - missing_eos_penalty * (x.ended == 0)
    non_score = -kl_coef * estimate(x.logratio * mask, kl_estimator)
    rewards = non_score.copy()
    rewards[np.arange(len(scores)), np.minimum(lengths, room - 1)] += scores
    if whiten_rewards:
        rewards = whitened(rewards, longer, shift_mean=False)
    values = x.values * longer
    found, returns = looped(rewards, values, np.ones_like(values), gamma=gamma, lam=lam)
    return whitened(found, mask), returns, non_score.sum(1), non_score.sum(1) + scores


TRL_OPTIONS = [
    {"kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "whiten_rewards": False},
    {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.8, "whiten_rewards": True},
]


def evidence(x, mask, *, kl_estimator, penalty):
    """What ftjax's estimator reads, in which a response stands behind one token of its prompt."""
    x, mask = jax.tree.map(jnp.asarray, (x, mask))
    behind = lambda rows: jnp.pad(rows, ((0, 0), (1, 0)))[None]  # noqa: E731
    return Evidence(
        rewards=shaping.less_unfinished(x.scores, x.ended, penalty=penalty)[None],
        counted=jnp.ones_like(x.scores)[None],
        mask=behind(mask),
        kl=behind(KL_ESTIMATORS[kl_estimator](x.logratio * mask)),
        kl_coef=0.3,
        values=jnp.pad(x.values, ((0, 0), (0, 1)), constant_values=np.nan)[None],
    )


@pytest.mark.parametrize("options", TRL_OPTIONS, ids=lambda options: options["kl_estimator"])
def test_the_advantages_of_responses_that_fill_their_room_are_those_of_trl(options, sampled):
    """With the penalty for a missing EOS, the divergence in the rewards, whitening and GAE: from rewards to advantages."""
    advantage, returns, _, whole = trl_worth(sampled, np.full(6, 5), kl_coef=0.3, missing_eos_penalty=1.5, **options)
    estimator, chosen = options["kl_estimator"], {name: x for name, x in options.items() if name != "kl_estimator"}

    def ours():
        given = evidence(sampled, np.ones((6, 5)), kl_estimator=estimator, penalty=1.5)
        return ESTIMATORS["gae"].estimate(given, **chosen), given.whole

    worth, of_responses = in_float64(ours)
    np.testing.assert_allclose(worth["advantages"][0, :, 1:], advantage, rtol=1e-10)
    np.testing.assert_allclose(worth["returns"][0, :, 1:], returns, rtol=1e-10)
    np.testing.assert_allclose(of_responses[0], whole, rtol=1e-12)


@pytest.mark.parametrize("options", TRL_OPTIONS, ids=lambda options: options["kl_estimator"])
def test_what_trl_adds_to_a_response_that_ended_early_is_one_token_of_the_mask(options, sampled):
    """The state after its end, which it pays and whose value it learns; ftjax pays the last token, and by λ = 1 both say the same."""
    lengths = np.array([2, 5, 1, 4, 5, 3])
    inside, longer = ((np.arange(5) < lengths[:, None] + more).astype(float) for more in (0, 1))
    advantage, returns, *_ = trl_worth(sampled, lengths, kl_coef=0.3, missing_eos_penalty=1.5, **options)
    x = sampled._replace(logratio=sampled.logratio * inside)  # what follows the end was not drawn

    def ours(mask, *, gamma, lam, whiten_rewards):
        given = evidence(x, mask, kl_estimator=options["kl_estimator"], penalty=1.5)
        rewards, mask = given.by_token[0, :, 1:], given.mask[0, :, 1:]
        rewards = advantages.whiten(rewards, mask, shift_mean=False) if whiten_rewards else rewards
        found, to_come = advantages.gae(rewards, x.values, mask, gamma=gamma, lam=lam)
        return found, advantages.whiten(found, inside), to_come

    chosen, plain = options | {}, {"gamma": 1.0, "lam": 1.0, "whiten_rewards": False}
    del chosen["kl_estimator"]
    found = in_float64(lambda: [ours(m, **of) for of in (chosen, plain) for m in (longer, inside)])
    np.testing.assert_allclose(found[0][1], advantage, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found[0][2], returns * longer, rtol=1e-10, atol=1e-14)
    assert np.abs((found[0][0] - found[1][0]) * inside).max() > 0.1
    np.testing.assert_allclose(found[2][0] * inside, found[3][0], rtol=1e-10, atol=1e-14)


HOLES = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 0, 1]], float)


@pytest.mark.parametrize(("kind", "gamma", "lam"), [("k1", 1.0, 0.95), ("k3", 0.9, 0.5), ("k3", 1.0, 1.0)])
def test_gae_with_tokens_that_are_stepped_over_is_that_of_verl_and_of_nemo_rl(kind, gamma, lam, sampled):
    """The divergence at each token, the reward at the last that counts; verl whitens by the sample's deviation."""
    last = HOLES.shape[1] - 1 - HOLES[:, ::-1].argmax(1)
    rewards = -0.3 * estimate(sampled.logratio, kind) * HOLES
    rewards[np.arange(6), last] += sampled.scores
    advantage, returns = looped(rewards, sampled.values, HOLES, gamma=gamma, lam=lam)
    given = lambda: evidence(sampled, HOLES, kl_estimator=kind, penalty=0.0)  # noqa: E731
    worth = in_float64(lambda: ESTIMATORS["gae"].estimate(given(), gamma=gamma, lam=lam))
    np.testing.assert_allclose(worth["returns"][0, :, 1:], returns, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(worth["advantages"][0, :, 1:], whitened(advantage, HOLES), rtol=1e-10, atol=1e-14)
