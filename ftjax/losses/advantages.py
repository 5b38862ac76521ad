"""How much better a response, or a token, was than expected: estimators of advantages from rewards, without a gradient.

Rewards come as `[p, g]`, g responses to each of p prompts, or as `[b, t]`, one a token. A response without a reward (a reward function said
None) is 0 in `counted`, may have any number in the rewards, counts in no mean, and has the advantage 0. All of a step's rewards are to be
given at once: micro-batches come after.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, Shaped

from ftjax.losses.responses import Given


def group_relative(
    rewards: Float[Given, "p g"], counted: Shaped[Given, "p g"] | None = None, *, scale: str = "group", epsilon: float = 1e-4, ddof: int = 1
) -> Float[Array, "p g"]:
    """Return (r - mean of its group) / (std + ε).

    Shao et al., 2024, arXiv 2402.03300: GRPO; without a scale: Dr. GRPO, Liu et al., 2025, arXiv 2503.20783; with that of
    the batch: Liu et al., 2025, arXiv 2508.08221. With the scale "group" a KL term in the loss is held against rewards over their group's
    deviation σ: its β is βσ, another one for each prompt, and smaller as the policy grows sure (`experiments/preference_frontier`).
    NeMo RL takes mean and deviation of the others of the group, unless told otherwise: `leave_one_out_scaled`.

    Args:
      rewards: of each response.
      counted: 1 where there is a reward; all if None.
      scale: "group": the standard deviation of each group; "batch": of all rewards; "none": 1, which is Dr. GRPO's.
      epsilon: ≥ 0, added to the standard deviation: TRL's 1e-4, verl's 1e-6. A group of equal rewards has the advantage 0 at any.
      ddof: 1 for the sample's standard deviation, n - 1, as TRL and verl have it; 0 for the population's.

    Raises:
      ValueError: an unknown scale.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"group_relative: scale is 'group', 'batch' or 'none', not {scale!r}.")
    counted = _counted(rewards, counted)
    centred = counted * (_known(rewards, counted) - _mean(rewards, counted, axis=1))
    if scale == "none":
        return centred
    deviation = _deviation(rewards, counted, axis=1 if scale == "group" else None, ddof=ddof)
    return centred / jnp.where(centred == 0, 1, jnp.broadcast_to(deviation, centred.shape) + epsilon)


def decoupled(
    rewards: Float[Given, "k p g"], weights: Float[Given, " k"], counted: Shaped[Given, "k p g"] | None = None, *, epsilon: float = 1e-4
) -> Float[Array, "p g"]:
    """Return Σ_k w_k (r_k - mean of its group) / (std + ε), standardised over the batch: each of several rewards by itself.

    GDPO, 2026, arXiv 2601.05242: a sum of rewards, normalised as one, gives different combinations of them the same advantage. verl
    standardises the sum over tokens, NeMo RL, unless told otherwise, each reward as `leave_one_out_scaled`.

    Args:
      rewards: of k reward functions.
      weights: of each function.
      counted: 1 where there is a reward; all if None.
      epsilon: as in `group_relative`.
    """
    counted = _counted(rewards, counted)
    each = jax.vmap(lambda r, c: group_relative(r, c, epsilon=epsilon))(rewards, counted)
    total, known = jnp.sum(weights[:, None, None] * each, axis=0), jnp.max(counted, axis=0)
    return known * (total - _mean(total, known, axis=None)) / (_deviation(total, known, axis=None, ddof=1) + epsilon)


def leave_one_out(rewards: Float[Given, "p g"], counted: Shaped[Given, "p g"] | None = None) -> Float[Array, "p g"]:
    """Return r - mean of the *other* rewards of its group: RLOO, Ahmadian et al., 2024, arXiv 2402.14740.

    It is g / (g - 1) times r - mean of the group. A reward without others has the advantage 0.
    """
    counted = _counted(rewards, counted)
    known, others = _known(rewards, counted), jnp.sum(counted, axis=1, keepdims=True) - counted
    baseline = (jnp.sum(known, axis=1, keepdims=True) - known) / jnp.maximum(others, 1)
    return jnp.where(others > 0, counted * (known - baseline), 0)


def leave_one_out_scaled(
    rewards: Float[Given, "p g"], counted: Shaped[Given, "p g"] | None = None, *, epsilon: float = 1e-6
) -> Float[Array, "p g"]:
    """Return (r - mean) / (std + ε) by mean and standard deviation of the *other* rewards of its group: NeMo RL's default for GRPO.

    Where there is one other, or all others are equal, it is r - mean. A reward without others has the advantage 0.

    Args:
      rewards: of each response.
      counted: 1 where there is a reward; all if None.
      epsilon: as in `group_relative`.
    """
    counted = _counted(rewards, counted)
    others = counted[:, None] * (1 - jnp.eye(rewards.shape[1], dtype=rewards.dtype)[None])
    each = jnp.broadcast_to(rewards[:, None], others.shape)
    largest, least = (sign * jnp.max(jnp.where(others > 0, sign * each, -jnp.inf), axis=2) for sign in (1, -1))
    deviation = _deviation(each, others, axis=2, ddof=1)[..., 0]
    # of equal rewards the deviation may be a rounding error, by which nothing is to be divided
    return leave_one_out(rewards, counted) / jnp.where(largest > least, deviation + epsilon, 1)


def preferred(
    rewards: Float[Given, "p g"], opponents: Float[Given, "p g"], counted: Shaped[Given, "p g"] | None = None
) -> Float[Array, "p g"]:
    """Return σ(r - r') - ½: how much oftener than not a response beats an opponent's, by the model of Bradley and Terry.

    Nash-MD's p - ½, Munos et al., 2023, arXiv 2312.00886, where a reward stands in for a judge of pairs, as in TRL.

    Args:
      rewards: of each response.
      opponents: what the response that each is compared with is worth.
      counted: 1 where there are both; all if None.
    """
    counted = _counted(rewards, counted)
    return counted * (jax.nn.sigmoid(_known(rewards, counted) - _known(opponents, counted)) - 0.5)


def optimal_baseline(
    rewards: Float[Given, "p g"], lengths: Real[Given, "p g"], counted: Shaped[Given, "p g"] | None = None
) -> Float[Array, "p g"]:
    """Return r - Σ l r / Σ l over its group, l the responses' lengths in tokens: OPO, Hao et al., 2025, arXiv 2505.23585.

    The baseline of the least variance, where the squared norm of a response's gradient grows with its length.
    """
    counted = _counted(rewards, counted)
    weights = counted * lengths.astype(rewards.dtype)
    return counted * (_known(rewards, counted) - _mean(rewards, weights, axis=1))


def greedy_baseline(
    rewards: Float[Given, "p g *t"], greedy: Float[Given, " p"], counted: Shaped[Given, "p g *t"] | None = None
) -> Float[Array, "p g *t"]:
    """Return r - the reward of the greedy response to the same prompt: ReMax, Li et al., 2023, arXiv 2310.10505.

    Args:
      rewards: of each response, or `to_come` after each of its tokens, of which a divergence before the token is no part, as in verl. The
        mean gradient is the same, as a token changes nothing that was before it, with less noise as a rule. The authors' code takes of
        the divergence each token's own alone, which is another gradient.
      greedy: of the greedy response to each prompt.
      counted: 1 where there is a reward, of both; all if None.
    """
    counted = _counted(rewards, counted)
    return jnp.where(counted > 0, rewards - greedy.reshape(-1, *[1] * (rewards.ndim - 1)), 0)


def to_come(rewards: Float[Given, "*b t"], mask: Float[Given, "*b t"], *, gamma: float = 1.0) -> Float[Array, "*b t"]:
    """Return the discounted sum of the rewards of each token that counts and of those after it; see `gae` for what does not count."""
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_plus_plus(rewards: Float[Given, "*b t"], mask: Float[Given, "*b t"], *, gamma: float = 1.0) -> Float[Array, "*b t"]:
    """Return the discounted sums of rewards to come, whitened over all tokens: REINFORCE++, Hu et al., 2025, arXiv 2501.03262.

    What does not count, such as a tool's answer, is stepped over; in verl a token before it hears of no reward after it.

    Args:
      rewards: of each token, a penalty for the KL divergence included: see `shaping.token_rewards`.
      mask: tokens that count.
      gamma: in [0, 1], the discount.
    """
    return whiten(to_come(rewards, mask, gamma=gamma), mask)


def reinforce_plus_plus_baseline(
    rewards: Float[Given, "p g"], mask: Float[Given, "p g t"], counted: Shaped[Given, "p g"] | None = None
) -> Float[Array, "p g t"]:
    """Return r - mean of its group, whitened over all tokens of the batch: REINFORCE++ with a baseline, of the same paper.

    NeMo RL takes a divergence in the rewards from each token by itself, after the baseline, and the population's deviation.

    Args:
      rewards: of each response.
      mask: tokens that count.
      counted: 1 where there is a reward; all if None.
    """
    counted = _counted(rewards, counted)
    mask = mask * counted[..., None]
    return whiten(jnp.broadcast_to(group_relative(rewards, counted, scale="none")[..., None], mask.shape), mask)


def gae(
    rewards: Float[Given, "*b t"], values: Float[Given, "*b t"], mask: Float[Given, "*b t"], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Float[Array, "*b t"], Float[Array, "*b t"]]:
    """Return advantages A and returns A + V: generalised advantage estimation.

    δ_t = r_t + γ V_t' - V_t        A_t = δ_t + γλ A_t'        t' the next token that counts; nothing comes after the last

    Schulman et al., 2015, arXiv 1506.02438, equation 16. Tokens that do not count, such as a tool's, are stepped over as if they were not
    there, and have 0; so in verl and NeMo RL. TRL 1.12 is one token longer where a response ended early: see `shaping.token_rewards`. Where
    NeMo RL has one λ for advantages and another for returns, two calls have them.

    Args:
      rewards: of each token.
      values: of the state that the token was drawn in, `shaping.state_values(scores.values)`.
      mask: tokens that count.
      gamma: γ in [0, 1], the discount; 1 is usual, as a response has few tokens.
      lam: λ in [0, 1]: 1 is the return minus the value, 0 trusts the values.
    """
    real = mask > 0
    rewards, values = (jnp.where(real, x, 0) for x in (rewards, values))

    def back(after: tuple[jax.Array, jax.Array], here: tuple[jax.Array, ...]):
        (next_value, next_advantage), (reward, value, counts) = after, here
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage)
        return carry, jnp.where(counts, advantage, 0)

    nothing = jnp.zeros(rewards.shape[:-1], rewards.dtype)
    by_time = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, real))
    advantages = jnp.moveaxis(jax.lax.scan(back, (nothing, nothing), by_time, reverse=True)[1], 0, -1)
    return advantages, advantages + values


def whiten(values: Float[Given, "*b"], mask: Float[Given, "*b"], *, shift_mean: bool = True, epsilon: float = 1e-8) -> Float[Array, "*b"]:
    """Return (x - mean) / sqrt(var + ε) where the mask is 1 and 0 elsewhere; the variance is the sample's, n - 1.

    Args:
      values: all of a step at once.
      mask: 1 for the values that count.
      shift_mean: whether the mean is taken away; otherwise only the scale changes, as for rewards.
      epsilon: against a division by 0 where all values are equal.
    """
    mean = _mean(values, mask, axis=None)
    scaled = (_known(values, mask) - mean) / jnp.sqrt(jnp.square(_deviation(values, mask, axis=None, ddof=1)) + epsilon)
    return mask * (scaled if shift_mean else scaled + mean)


def zero_variance_share(rewards: Float[Given, "p g"], counted: Shaped[Given, "p g"] | None = None) -> Float[Array, ""]:
    """Return the share of groups whose rewards are all equal, which teach nothing; of groups with two rewards or more."""
    counted = _counted(rewards, counted)
    spread = [jnp.max(jnp.where(counted > 0, sign * rewards, -jnp.inf), axis=1) for sign in (1, -1)]
    groups = jnp.sum(counted, axis=1) > 1
    equal = groups & (spread[0] + spread[1] == 0)
    return jnp.sum(equal).astype(rewards.dtype) / jnp.maximum(jnp.sum(groups), 1).astype(rewards.dtype)


def _known(values: Given, counted: Given) -> jax.Array:
    """Return what counts, and 0 for the rest, whatever it is."""
    return jnp.where(counted > 0, values, 0)


def _counted(rewards: Given, counted: Given | None) -> Given:
    return jnp.ones_like(rewards) if counted is None else counted.astype(rewards.dtype)


def _mean(values: Given, weights: Given, *, axis: int | None) -> jax.Array:
    total = jnp.sum(_known(values, weights) * weights, axis=axis, keepdims=True)
    return total / jnp.maximum(jnp.sum(weights, axis=axis, keepdims=True), 1)


def _deviation(values: Given, mask: Given, *, axis: int | None, ddof: int) -> jax.Array:
    squares = mask * jnp.square(_known(values, mask) - _mean(values, mask, axis=axis))
    count = jnp.sum(mask, axis=axis, keepdims=True)
    return jnp.sqrt(jnp.sum(squares, axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1))
