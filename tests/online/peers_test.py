"""Advantages as verl and NeMo RL define them: their definitions in our words, in NumPy's float64, beside ftjax's estimators.

Of 2026's main branches: verl's `compute_*_advantage` of `core_algos.py`, which read what each token is paid, its divergence from the
reference included, and NeMo RL's `GRPOAdvantageEstimator`. Not compared is:

- a reward without others of its prompt, which verl takes for the advantage; ftjax teaches nothing there;
- what ftjax has not: verl's `gpg`, `grpo_passk` and optimal token baselines; NeMo RL's REINFORCE++, which takes a divergence from each
  token by itself and has the population's deviation; GDPO of both, see `losses.advantages.decoupled`.
"""

from typing import NamedTuple

import numpy as np
import pytest

from ftjax.losses import advantages
from ftjax.online.estimators import ESTIMATORS, Evidence
from tests.losses.peers_test import HOLES, in_float64, whitened

GROUP, GAMMA = 3, 0.9
MASKS = {"ends early": (np.arange(5) < np.array([[3], [5], [1], [4], [5], [2]])).astype(float), "stepped over": HOLES}
COEFS = (0.0, 0.3)


class Rows(NamedTuple):
    """What a definition reads of six responses, three to each of two prompts."""

    rewards: np.ndarray
    """`[b, t]`: of each token."""
    mask: np.ndarray
    prompts: np.ndarray
    """`[b]`: the number of its prompt."""
    greedy: np.ndarray
    """`[b]`: what the likeliest answer to its prompt is worth."""


def outcome(less):
    """The advantage of a whole response at each of its tokens, by `less(own, of the prompt, lengths of the prompt)`."""

    def estimate(x, **options):
        whole, lengths, found = x.rewards.sum(1), x.mask.sum(1), np.zeros(len(x.mask))
        for row, own in enumerate(whole):
            beside = x.prompts == x.prompts[row]
            found[row] = less(own, whole[beside], lengths[beside], **options)
        return found[:, None] * x.mask

    return estimate


grpo = outcome(lambda own, group, lengths, epsilon=1e-6: (own - group.mean()) / (group.std(ddof=1) + epsilon))
centred = outcome(lambda own, group, lengths: own - group.mean())
rloo = outcome(lambda own, group, lengths: (own - group.mean()) * len(group) / (len(group) - 1))
opo = outcome(lambda own, group, lengths: own - np.dot(lengths, group) / lengths.sum())


def reinforce_plus_plus_baseline(x):
    return whitened(centred(x), x.mask)


def reinforce_plus_plus(x, *, gamma=1.0):
    """What is carried from the end is forgotten where a token does not count."""
    carried, found = np.zeros(len(x.mask)), np.zeros(x.mask.shape)
    for t in reversed(range(x.mask.shape[1])):
        found[:, t] = carried = x.rewards[:, t] + gamma * carried
        carried = carried * x.mask[:, t]
    return whitened(found, x.mask)


def remax(x):
    after = np.cumsum((x.rewards * x.mask)[:, ::-1], axis=1)[:, ::-1]
    return (after - x.greedy[:, None]) * x.mask


def squeezed(definition):
    """The definition on responses without the tokens that do not count, each then put where it was."""

    def estimate(x, **options):
        order = np.argsort(x.mask == 0, axis=1, kind="stable")
        moved = definition(
            x._replace(rewards=np.take_along_axis(x.rewards, order, 1), mask=np.take_along_axis(x.mask, order, 1)), **options
        )
        found = np.zeros_like(moved)
        np.put_along_axis(found, order, moved, 1)
        return found

    return estimate


VERL = {
    "group_relative": (grpo, {"epsilon": 1e-4}, {}),
    "group_centred": (centred, {}, {}),
    "leave_one_out": (rloo, {}, {}),
    "optimal_baseline": (opo, {}, {}),
    "greedy_baseline": (remax, {}, {}),
    "reinforce_plus_plus": (squeezed(reinforce_plus_plus), {"gamma": GAMMA}, {"gamma": GAMMA}),
    "reinforce_plus_plus_baseline": (reinforce_plus_plus_baseline, {}, {}),
}
"""By our names: the definition, its options and ours."""


def given(where, coef):
    """The same responses as a definition and as ftjax reads them."""
    draw, mask = np.random.default_rng(3), MASKS[where]
    scores, logratio, greedy = draw.normal(size=6), draw.normal(size=mask.shape), draw.normal(size=2)
    rewards = -coef * logratio * mask
    rewards[np.arange(6), mask.shape[1] - 1 - mask[:, ::-1].argmax(1)] += scores
    groups = lambda x: x.reshape(2, GROUP, *x.shape[1:])  # noqa: E731
    evidence = Evidence(groups(scores), np.ones((2, GROUP)), groups(mask), groups(logratio), coef, greedy=greedy)
    return Rows(rewards, mask, np.repeat([0, 1], GROUP), np.repeat(greedy, GROUP)), evidence


@pytest.fixture(scope="module")
def found():
    """Each estimator's advantages of every experience, in one program."""

    def every(experiences):
        return {
            (name, *where): ESTIMATORS[name].estimate(evidence, **VERL[name][2])["advantages"]
            for where, evidence in experiences.items()
            for name in VERL
        }

    experiences = {(where, coef): given(where, coef)[1] for where in MASKS for coef in COEFS}
    return in_float64(every, experiences)


@pytest.mark.parametrize("coef", COEFS)
@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("name", VERL)
def test_advantages_are_those_of_verl(name, where, coef, found):
    rows, _ = given(where, coef)
    definition, options, _ = VERL[name]
    worth = found[name, where, coef]
    worth = (worth if worth.ndim == 3 else worth[..., None]) * rows.mask.reshape(2, GROUP, -1)
    np.testing.assert_allclose(worth.reshape(rows.mask.shape), definition(rows, **options), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", VERL)
def test_a_divergence_in_the_rewards_changes_each_of_them(name, found):
    """Otherwise it could be left out unseen."""
    for where in MASKS:
        assert np.abs(found[name, where, 0.3] - found[name, where, 0.0]).max() > 0.1


def test_the_deviation_of_grpo_takes_verl_s_epsilon():
    rows, evidence = given("ends early", 0.0)
    ours = in_float64(lambda rewards: advantages.group_relative(1e-5 * rewards, epsilon=1e-6), evidence.rewards)
    np.testing.assert_allclose(ours.reshape(6, 1) * rows.mask, grpo(rows._replace(rewards=1e-5 * rows.rewards)), rtol=1e-10)


def test_with_reinforce_plus_plus_a_token_hears_of_rewards_after_a_tool_s_answer_and_in_verl_not(found):
    rows, _ = given("stepped over", 0.0)
    ours, theirs = found["reinforce_plus_plus", "stepped over", 0.0].reshape(rows.mask.shape), reinforce_plus_plus(rows, gamma=GAMMA)
    assert np.ptp(theirs[[0, 1], 0]) == 0 and np.ptp(ours[[0, 1], 0]) > 0.1


def test_a_divergence_before_a_token_is_no_part_of_the_mean_gradient_of_remax():
    """Of every response of two tokens: the mean of A ∇log π is that by whole responses, though none has the same."""
    first, second = np.array([0.3, 0.7]), np.array([[0.6, 0.4], [0.1, 0.9]])
    chances = (first[:, None] * second).ravel()
    kl = np.log(np.stack([np.repeat(first / 0.5, 2), (second / [0.8, 0.2]).ravel()], axis=1))[None]
    rewards, mask = np.array([[1.0, 0.0, 0.5, 2.0]]), np.ones((1, 4, 2))
    evidence = Evidence(rewards, np.ones((1, 4)), mask, kl, 0.3, greedy=np.array([2.0]))
    by_token, whole = in_float64(lambda x: (ESTIMATORS["greedy_baseline"].estimate(x)["advantages"], x.whole - x.greedy[:, None]), evidence)
    # logits of the first token, and of the second after each first
    slopes = np.zeros((4, 2, 6))
    for row, (a, b) in enumerate(np.ndindex(2, 2)):
        slopes[row, 0, :2] = np.eye(2)[a] - first
        slopes[row, 1, 2 + 2 * a : 4 + 2 * a] = np.eye(2)[b] - second[a]
    gradients = [np.einsum("rt,rtk->rk", np.broadcast_to(x, (4, 2)), slopes) for x in (by_token[0], whole[0][:, None])]
    means = [chances @ x for x in gradients]
    np.testing.assert_allclose(*means, rtol=1e-12)
    assert np.abs(means[0]).max() > 0.05 and np.abs(gradients[0] - gradients[1]).max() > 0.05


def nemo_grpo(rewards, *, epsilon=1e-6):
    """Where the deviation of the others is 0, or of one, nothing is divided."""
    found = np.zeros(rewards.shape)
    for at in np.ndindex(rewards.shape):
        others = np.delete(rewards[at[0]], at[1])
        deviation = others.std(ddof=1) if len(others) > 1 else 0.0
        found[at] = (rewards[at] - others.mean()) / (deviation + epsilon if deviation > 0 else 1)
    return found


@pytest.mark.parametrize("rewards", [np.random.default_rng(4).normal(size=(3, 5)), np.array([[1.0, 0, 0, 0], [2, 2, 2, 2]]), np.eye(2)])
def test_advantages_beside_the_others_are_those_of_nemo_rl(rewards):
    ours = in_float64(advantages.leave_one_out_scaled, rewards)
    np.testing.assert_allclose(ours, nemo_grpo(rewards), rtol=1e-10)
    assert np.abs(ours).max() > 0.5
