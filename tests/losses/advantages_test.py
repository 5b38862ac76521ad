import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import advantages
from tests.losses.examples import GOLDEN

REWARDS = GOLDEN["advantages/rewards"]  # [3, 4]; one is NaN, and the last group is all equal
COUNTED = ~np.isnan(REWARDS)
LENGTHS = np.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
RNG = np.random.default_rng(0)
MASK = np.array([[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], np.float32)
"""The second row has a tool's token in the middle."""
TOKEN_REWARDS, VALUES = RNG.normal(size=(2, *MASK.shape)).astype(np.float32)


def of(estimator, *arrays, **options):
    """Call an estimator in one program, with numbers where nothing counts that would show."""
    return jax.device_get(jax.jit(lambda *given: estimator(*given, **options))(*arrays))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trl(scale):
    """Its standard deviation is the sample's."""
    expected = GOLDEN[f"advantages/{scale}"]
    np.testing.assert_allclose(of(advantages.group_relative, REWARDS.astype("f"), COUNTED, scale=scale), expected, rtol=1e-5, atol=1e-6)


def test_leave_one_out_advantages_are_those_of_trl():
    found = of(advantages.leave_one_out, REWARDS.astype("f"), COUNTED)
    np.testing.assert_allclose(found, GOLDEN["advantages/leave_one_out"], rtol=1e-5, atol=1e-6)


def test_decoupled_advantages_of_two_rewards_are_those_of_trl():
    rewards = np.stack([REWARDS, REWARDS[:, ::-1] ** 2]).astype("f")
    found = of(advantages.decoupled, rewards, np.array([1.0, 0.5], "f"), ~np.isnan(rewards))
    np.testing.assert_allclose(found, GOLDEN["advantages/decoupled"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", [advantages.group_relative, advantages.leave_one_out])
def test_the_advantages_of_a_group_sum_to_0(estimator):
    found = of(estimator, 5 + RNG.normal(size=(6, 8)).astype("f"))
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-5)
    assert np.abs(found).max() > 0.5


@pytest.mark.parametrize("estimator", [advantages.group_relative, advantages.leave_one_out])
def test_a_reward_alone_and_rewards_that_are_equal_teach_nothing(estimator):
    alone = np.array([[0, 0, 1], [1, 1, 1]])
    assert not of(estimator, np.array([[np.nan, np.nan, 7.0], [0.1, 0.1, 0.1]], "f"), alone).round(3).any()


def test_the_population_s_deviation_is_asked_for():
    rewards = np.array([[0.0, 2.0]], "f")  # deviation 1 of the two, √2 of a sample
    np.testing.assert_allclose(of(advantages.group_relative, rewards, ddof=0, epsilon=0.0), [[-1, 1]])
    np.testing.assert_allclose(of(advantages.group_relative, rewards, epsilon=0.0), [[-(2**-0.5), 2**-0.5]], rtol=1e-6)


def test_others_that_are_equal_divide_nothing():
    """Seven times 0.1 has a mean in float32 that is not 0.1, and so a deviation of rounding errors."""
    rewards = np.array([[0.1] * 7 + [1.0], [0.1] * 8], "f")
    found = of(advantages.leave_one_out_scaled, rewards, np.array([[1] * 8, [1] * 5 + [0] * 3]))
    assert found[0, -1] == pytest.approx(0.9, rel=1e-6)
    np.testing.assert_allclose(found[0, :-1], (0.1 - 1.6 / 7) / (0.9 / 7**0.5), rtol=1e-4)
    np.testing.assert_allclose(found[1], 0, atol=1e-7)
    np.testing.assert_allclose(of(advantages.leave_one_out_scaled, np.array([[1.0, 3.0]], "f")), [[-2, 2]])


def test_the_optimal_baseline_weighs_by_length():
    """Group 0: (3·1 + 1·0 + 4·½ + 1·¼) / 9; in group 1 the second response has no reward."""
    found = of(advantages.optimal_baseline, REWARDS.astype("f"), LENGTHS, COUNTED)
    np.testing.assert_allclose(found[0], REWARDS[0] - 5.25 / 9, rtol=1e-6)
    np.testing.assert_allclose(found[1], np.nan_to_num(REWARDS[1] - (5 + 6 + 12) / 13), rtol=1e-6)


def test_the_greedy_response_is_the_baseline_of_remax():
    found = of(advantages.greedy_baseline, REWARDS.astype("f"), np.array([0.5, 1.0, 0.0], "f"), COUNTED)
    np.testing.assert_allclose(found, [[0.5, -0.5, 0, -0.25], [0, 0, 2, 1], [0.5] * 4])


def gae_by_definition(rewards, values, mask, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_(t+k), over the tokens that count, in float64."""
    found = np.zeros(mask.shape)
    for row, counts in enumerate(mask):
        at = np.flatnonzero(counts)
        v = np.append(values[row, at], 0.0)
        delta = [rewards[row, t] + gamma * v[k + 1] - v[k] for k, t in enumerate(at)]
        for k, t in enumerate(at):
            found[row, t] = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(at)))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    noise = np.where(MASK > 0, 0, np.float32("nan"))
    found, returns = of(advantages.gae, TOKEN_REWARDS + noise, VALUES + noise, MASK, gamma=gamma, lam=lam)
    expected = gae_by_definition(TOKEN_REWARDS, VALUES, MASK, gamma, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, (expected + VALUES) * MASK, rtol=1e-5, atol=1e-6)


def whitened(values, mask):
    chosen = values[mask > 0].astype(np.float64)
    return (values - chosen.mean()) / chosen.std(ddof=1) * mask


def test_whitening_has_mean_0_and_the_variance_1_of_a_sample():
    noise = np.where(MASK > 0, 0, np.float32("nan"))
    np.testing.assert_allclose(of(advantages.whiten, VALUES + noise, MASK), whitened(VALUES, MASK), rtol=1e-5, atol=1e-6)
    scaled = of(advantages.whiten, VALUES, MASK, shift_mean=False)
    np.testing.assert_allclose(scaled, (whitened(VALUES, MASK) + VALUES[MASK > 0].mean()) * MASK, rtol=1e-5, atol=1e-6)
    assert not of(advantages.whiten, 0 * VALUES + 3, MASK).any()


def test_reinforce_plus_plus_whitens_the_rewards_to_come():
    to_come = gae_by_definition(TOKEN_REWARDS, 0 * VALUES, MASK, 0.9, 1.0)
    found = of(advantages.reinforce_plus_plus, TOKEN_REWARDS, MASK, gamma=0.9)
    np.testing.assert_allclose(found, whitened(to_come, MASK), rtol=1e-5, atol=1e-6)


def test_reinforce_plus_plus_with_a_baseline_whitens_what_is_above_the_group():
    """Of the token-weighted batch, in which the response without a reward has no tokens."""
    mask = (np.arange(9) < LENGTHS[..., None]).astype("f")
    counted = mask * COUNTED[..., None]
    above = np.nan_to_num(REWARDS - np.nanmean(REWARDS, 1, keepdims=True))
    found = of(advantages.reinforce_plus_plus_baseline, REWARDS.astype("f"), mask, COUNTED)
    np.testing.assert_allclose(found, whitened(np.broadcast_to(above[..., None], mask.shape), counted), rtol=1e-5, atol=1e-6)


def test_groups_of_equal_rewards_are_counted():
    assert of(advantages.zero_variance_share, REWARDS.astype("f"), COUNTED) == pytest.approx(1 / 3)
    assert of(advantages.zero_variance_share, np.array([[1.0, 1.0], [np.nan, 2.0]], "f"), np.array([[1, 1], [0, 1]])) == 1
    assert of(advantages.zero_variance_share, jnp.ones((2, 1))) == 0


def test_an_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match="'group', 'batch' or 'none'"):
        advantages.group_relative(jnp.ones((1, 2)), scale="std")
