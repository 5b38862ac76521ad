import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.losses.correction import CORRECTIONS, off_policy_mask
from ftjax.losses.entropy import top_entropy
from ftjax.losses.kl import KL_ESTIMATORS
from ftjax.losses.surrogates import SURROGATES, Actions
from ftjax.types import Batch, Scores
from tests.losses.examples import said


def batch_of(logps, mask=None, **fields):
    ints = jnp.zeros(logps.shape, jnp.int32)
    return Batch(ints, jnp.ones(logps.shape) if mask is None else jnp.asarray(mask, jnp.float32), ints, ints + 1, **fields)


def test_grpo_by_hand():
    """Ratios 2 and 1 of a good response: min(2, 1.2) = 1.2 and 1, mean 1.1, times A = 2; ratio 2 of a bad one, A = -1: 2. (2 - 2.2) / 2."""
    old = jnp.full((2, 2), -3.0)
    logps = old + jnp.log(jnp.array([[2.0, 1.0], [2.0, 9.0]]))
    batch = batch_of(logps, [[1, 1], [1, 0]], old_logps=old, advantages=jnp.array([2.0, -1.0]))
    loss, metrics = said(losses.LOSSES["grpo"], Scores(logps), batch)
    assert loss.value() == pytest.approx(-0.1) and loss.weight == 2
    said_of = {name: metrics[name].value() for name in ("ratio", "ratio/min", "ratio/max", "clip/low", "clip/high")}
    assert said_of == pytest.approx({"ratio": 5 / 3, "ratio/min": 1.5, "ratio/max": 2.0, "clip/low": 0.0, "clip/high": 1 / 3})
    assert metrics["kl/old"].value() == pytest.approx((2 * (1 - math.log(2))) / 3)


RATIOS = np.array([[8, 1 / 2, 1], [2, 1 / 4, 1 / 4]])
"""Of two responses: the first has two tokens, whose product is 4 and whose geometric mean is 2; of the second they are ⅛ and ½."""
LOGPS = np.array([[-1, -2, 0], [-1, -2, -3]])
E, LOG2 = math.exp, math.log(2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


BY_HAND = {
    # ρA, without a clip, summed: (-(16 + 1) + (2 + ¼ + ¼)) / 2 and its opposite
    **dict.fromkeys(("reinforce", "remax", "opo"), (-14.5 / 2, 14.5 / 2)),
    # the loss of a response is that of its product, 4 or ⅛: min(8, 2.4), min(-⅛, -0.8); min(-8, -2.4), min(⅛, 0.8)
    "rloo": ((-2.4 + 0.8) / 2, (8 - 1 / 8) / 2),
    # clipped to [0.8, 1.2], of good tokens at most 2.4 and 1, of bad ones at least 2, 0.8, 0.8; then 16, 1.6 and 1.2, ¼, ¼
    "grpo": ((-3.4 / 2 + 3.6 / 3) / 2, (17.6 / 2 - 1.7 / 3) / 2),
    **dict.fromkeys(("bnpo", "reinforce_plus_plus"), ((-3.4 + 3.6) / 5, (17.6 - 1.7) / 5)),
    "dr_grpo": ((-3.4 + 3.6) / 512 / 2, (17.6 - 1.7) / 512 / 2),
    # the same up to 1.28: 2.56 instead of 2.4, and 1.28 instead of 1.2
    "dapo": ((-3.56 + 3.6) / 5, (17.6 - 1.78) / 5),
    # weights 5 (clipped), ½ and 2, ¼, ¼ times A log π: 10, 2 and -2, -½, -¾
    "cispo": ((12 - 3.25) / 5, (3.25 - 12) / 5),
    # the geometric means 2 and ½, clipped to [0.9997, 1.0004]: min(4, 2.0008), min(-½, -0.9997); min(-4, …) and min(½, …)
    **dict.fromkeys(("gspo", "gspo_token"), ((-2.0008 + 0.9997) / 2, (4 - 0.5) / 2)),
    # the same for each token of 2 and 3
    "luspo": ((2 * -2.0008 + 3 * 0.9997) / 2, (2 * 4 - 3 * 0.5) / 2),
    # 4/τ σ(τ(ρ - 1)) A: τ = 1 for the good response, 1.05 for the bad one
    "sapo": (
        (-8 * (sigmoid(7) + sigmoid(-0.5)) / 2 + 4 / 1.05 * (sigmoid(1.05) + 2 * sigmoid(-0.7875)) / 3) / 2,
        (8 / 1.05 * (sigmoid(7.35) + sigmoid(-0.525)) / 2 - 4 * (sigmoid(1) + 2 * sigmoid(-0.75)) / 3) / 2,
    ),
    # φ(4) = 4² e^(3(1 - 4)), φ(⅛) = ⅛³ e^(2(1 - ⅛)) times A Σ log π, 2 · -3 and -1 · -6; then 4³ e^(2(1 - 4)), ⅛² e^(3(1 - ⅛))
    "vespo": ((16 * E(-9) * 6 - E(1.75) / 512 * 6) / 5, (-64 * E(-6) * 6 + E(2.625) / 64 * 6) / 5),
    # log ρ is 3 and -1, and 1, -2, -2 times log 2; of a good response at most 0.4, of a bad one at least -0.4
    "gmpo": (
        (-2 * E((0.4 - LOG2) / 2) + E((LOG2 - 0.8) / 3)) / 2,
        (2 * E((3 * LOG2 - 0.4) / 2) - E((0.4 - 4 * LOG2) / 3)) / 2,
    ),
    # the policy's as bnpo; returns are 1, values of the first 0.1, of the second 3, clipped to 0.2: (2 · 0.9² + 3 · 2²) / 5 · ½ · 0.1
    "ppo": (0.2 / 5 + 0.1362, 15.9 / 5 + 0.1362),
    # Σ (0.1 log π/π_ref - A) log π, with π_ref = π_old: of the first 6 - 0.1 log 2, of the second -6 + 0.9 log 2; then -6 …, 6 …
    "nash_md": (0.4 * LOG2, 0.4 * LOG2),
}
"""The loss where the first response is good, A = (2, -1), and where the second is, A = (-2, 1): both signs on both sides of each clip."""


@pytest.fixture(scope="module")
def by_hand():
    logps = jnp.asarray(LOGPS, jnp.float32)
    old = logps - jnp.log(jnp.asarray(RATIOS, jnp.float32))
    values, returns = jnp.array([[0.1, 0.1, 0.1], [3.0, 3.0, 3.0]]), jnp.ones((2, 3))

    def behind(x):
        """One token of a prompt before them, whose value is that of the state in which the first is drawn."""
        return jnp.pad(x, ((0, 0), (1, 0)))

    scores = Scores(behind(logps), values=jnp.pad(values, ((0, 0), (0, 1))))
    fields = {"old_logps": behind(old), "reference_logps": behind(old), "returns": behind(returns), "old_values": jnp.zeros((2, 4))}
    batches = [batch_of(scores.logps, [[0, 1, 1, 0], [0, 1, 1, 1]], advantages=jnp.array(a), **fields) for a in ([2.0, -1.0], [-2.0, 1.0])]
    every = lambda scores, batches: {name: [losses.LOSSES[name](scores, batch)[0] for batch in batches] for name in BY_HAND}  # noqa: E731
    return said(every, scores, batches)


@pytest.mark.parametrize("name", {**losses.POLICY_LOSSES, "ppo": None, "nash_md": None})
def test_the_loss_by_hand(name, by_hand):
    np.testing.assert_allclose([mean.value() for mean in by_hand[name]], BY_HAND[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["reinforce", "grpo", "cispo", "gspo", "ppo", "nash_md"])
def test_where_old_logps_are_nan_the_policy_is_asked_itself(name):
    """Value and gradient are those of a batch without them, and the ratio is exactly 1."""
    draw = np.random.default_rng(0)
    logps, reference, behavior, values = (jnp.asarray(-draw.exponential(size=(3, 5)), jnp.float32) for _ in range(4))
    fields = {"advantages": jnp.array([1.0, -2.0, 0.5]), "reference_logps": reference, "behavior_logps": behavior, "returns": values}
    options = {} if name == "nash_md" else {"correction": "token_truncate"}
    found = []
    for old in (None, jnp.full((3, 5), jnp.nan)):
        batch = batch_of(logps, old_logps=old, **fields)
        loss = lambda x, batch=batch: losses.LOSSES[name](Scores(x, values=values), batch, **options)  # noqa: E731
        (value, metrics), gradient = jax.value_and_grad(lambda x, loss=loss: (loss(x)[0].total, loss(x)[1]), has_aux=True)(logps)
        found.append((value, gradient, metrics["ratio"].value(), metrics["ratio/min"].value()))
    assert found[0][2:] == found[1][2:] == (1, 1) and np.abs(found[0][1]).max() > 0.01
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


SIDES = {"low": 0.5, "within": 1.1, "high": 1.9}
# d loss / d log ρ over -ρ A, for A = 1 and A = -1
SLOPES = {
    "unclipped": {"low": (1, 1), "within": (1, 1), "high": (1, 1)},
    "clipped": {"low": (1, 0), "within": (1, 1), "high": (0, 1)},
    "gmpo": {"low": (1, 0), "within": (1, 1), "high": (0, 1)},
}


@pytest.fixture(scope="module")
def slopes():
    """Gradients of each surrogate in the log-probability, for each side of the clip and each sign of the advantage, over -A."""
    ratios, signs = np.meshgrid(list(SIDES.values()), [1.0, -1.0], indexing="ij")
    options = {"clipped": {"ratio_cap": 1.5}, "cispo": {"clip_low": 0.2, "clip_high": 0.2}}

    def total(x, name, **options):
        rows = x.reshape(-1, 1)
        actions = Actions(rows, rows, signs.reshape(-1, 1).astype("f"), jnp.ones_like(rows))
        return jnp.sum(SURROGATES[name](actions, **options)[0])

    of = lambda x, name, **options: jax.grad(total)(x, name, **options) / -signs.astype("f")  # noqa: E731
    every = lambda x: {name: of(x, name) for name in SURROGATES} | {f"{name}+": of(x, name, **more) for name, more in options.items()}  # noqa: E731
    return jax.device_get(jax.jit(every)(jnp.log(ratios).astype(jnp.float32)))


@pytest.mark.parametrize("name", SLOPES)
def test_a_clip_stops_the_gradient_on_its_own_side_for_each_sign_of_the_advantage(name, slopes):
    expected = [[ratio * slope for slope in SLOPES[name][side]] for side, ratio in SIDES.items()]
    np.testing.assert_allclose(slopes[name], expected, rtol=1e-5, atol=1e-6)


def test_a_second_clip_bounds_the_loss_of_a_bad_response(slopes):
    np.testing.assert_allclose(slopes["clipped+"], [[0.5, 0], [1.1, 1.1], [0, 0]], rtol=1e-5, atol=1e-6)


def test_cispo_clips_the_weight_and_keeps_every_gradient(slopes):
    """The weight has no gradient of its own: the slope is the clipped ratio, not that times 1 + log π."""
    np.testing.assert_allclose(slopes["cispo+"], [[0.8, 0.8], [1.1, 1.1], [1.2, 1.2]], rtol=1e-5)


def test_sapo_closes_softly_and_sooner_on_bad_responses(slopes):
    def slope(ratio, tau):
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return 4 * gate * (1 - gate) * ratio

    np.testing.assert_allclose(slopes["sapo"], [[slope(ratio, tau) for tau in (1.0, 1.05)] for ratio in SIDES.values()], rtol=1e-5)


@pytest.mark.parametrize("name", losses.POLICY_LOSSES)
def test_at_the_first_step_the_ratio_is_1_and_the_gradient_that_of_reinforce(name):
    logps = jnp.array([[-0.3, -2.0, -1e4], [-0.1, -5.0, 0.0]])
    batch = batch_of(logps, advantages=jnp.array([2.0, -0.5]))

    def total(x):
        loss, metrics = losses.LOSSES[name](Scores(x), batch)
        return loss.total / loss.weight, metrics

    gradient, metrics = jax.jit(jax.grad(total, has_aux=True))(logps)
    sums = dict.fromkeys(("reinforce", "remax", "opo", "rloo", "luspo"), 1)
    share = (sums | {"dr_grpo": 1 / 512}).get(name, 1 / 3)  # of a token in the loss of its response
    np.testing.assert_allclose(gradient, np.repeat([[-2.0], [0.5]], 3, 1) * share / 2, rtol=1e-5)
    assert [metrics[f"ratio{end}"].value() for end in ("", "/min", "/max")] == [1.0, 1.0, 1.0]


DISTINCT = ("reinforce", "rloo", "grpo", "cispo", "gspo", "gspo_token", "sapo", "vespo", "gmpo", "ppo", "nash_md")


def test_ratios_beyond_all_bounds_stay_finite():
    """Tokens that were impossible and are certain, and the reverse, of good and of bad responses; the first kind under a reference too."""
    logps = jnp.array([[0.0, -1e4], [0.0, -1e4]])
    batch = batch_of(logps, old_logps=-1e4 - logps, reference_logps=-1e4 - logps, advantages=jnp.array([1.0, -1.0]))
    batch = dataclasses.replace(batch, returns=-logps)

    def total(x, name):
        loss, metrics = losses.LOSSES[name](Scores(x, values=x), batch, **({} if name == "nash_md" else {"kl_coef": 0.1}))
        return loss.total, (loss, metrics)

    every = lambda x: {name: jax.grad(total, has_aux=True)(x, name) for name in DISTINCT}  # noqa: E731
    for name, found in jax.device_get(jax.jit(every)(logps)).items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), name


def test_advantages_of_tokens_are_used_as_they_are():
    logps = jnp.full((2, 3), -1.0)
    each = jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
    loss, _ = said(losses.LOSSES["bnpo"], Scores(logps), batch_of(logps, advantages=each))
    assert loss.value() == pytest.approx(-5 / 6)


def test_estimates_of_the_divergence_agree_in_the_mean_and_the_ratio_makes_their_gradients_right():
    """Over all tokens of a small vocabulary, weighted by their probability: the expectation without sampling."""
    policy, anchor = jax.random.normal(jax.random.key(0), (2, 6))
    anchor = jax.nn.log_softmax(anchor)

    def expected(logits, frozen, name, weighted):
        """Tokens are drawn from the policy of `frozen`, in which there is no gradient."""
        drawn, logps = jax.nn.log_softmax(frozen), jax.nn.log_softmax(logits)
        ratio = jnp.exp(logps - drawn) if weighted else 1.0
        return jnp.sum(jnp.exp(drawn) * ratio * KL_ESTIMATORS[name](logps - anchor))

    def exact(logits, forward=False):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(anchor) * (anchor - logps)) if forward else jnp.sum(jnp.exp(logps) * (logps - anchor))

    @jax.jit
    def everything(policy):
        of = lambda weighted: {n: jax.value_and_grad(expected)(policy, policy, n, weighted) for n in KL_ESTIMATORS}  # noqa: E731
        return of(False), of(True), jax.value_and_grad(exact)(policy), jax.grad(exact)(policy, True)

    plain, weighted, (value, gradient), other = everything(policy)
    for name in ("k1", "k3", "k1+", "k3+"):
        np.testing.assert_allclose(plain[name][0], value, rtol=1e-5)
    for name in ("k1", "k3"):
        np.testing.assert_allclose(weighted[name][1], gradient, atol=1e-5)
    for name in ("k2", "k1+", "k3+"):
        np.testing.assert_allclose(plain[name][1], gradient, atol=1e-5)
    np.testing.assert_allclose(plain["k1"][1], 0, atol=1e-6)
    np.testing.assert_allclose(plain["k3"][1], other, atol=1e-5)
    assert np.abs(gradient).max() > 0.1


def test_the_entropy_has_its_own_gradient():
    logps = jnp.full((2, 2), -1.0)
    batch = batch_of(logps, [[1, 1], [1, 0]], advantages=jnp.ones(2))
    loss = partial(losses.LOSSES["bnpo"], entropy_coef=0.3)
    gradient = jax.jit(jax.grad(lambda entropy: loss(Scores(logps, entropy), batch)[0].total))(logps)
    np.testing.assert_allclose(gradient, -0.3 * batch.loss_mask, rtol=1e-6)


def test_the_tokens_of_the_highest_entropy():
    """Five tokens, a share of 0.4: the quantile 0.6 lies at 2.4 of 0 … 4, between the third and the fourth."""
    entropy = jnp.array([[0.5, 9.0, 0.1, 0.4, 0.9, 0.2], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    mask = jnp.array([[1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], jnp.float32)
    expected = [[1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    np.testing.assert_array_equal(jax.jit(partial(top_entropy, share=0.4))(entropy, mask), expected)
    np.testing.assert_array_equal(jax.jit(partial(top_entropy, share=1.0))(entropy, mask), mask)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_truncate", [[0.5, 3.0, 1.0], [2.0, 2.0, 1.0]]),
        ("token_mask", [[0.5, 0.0, 1.0], [2.0, 2.0, 1.0]]),
        ("sequence_truncate", [[2.0] * 3, [3.0] * 3]),
        ("sequence_mask", [[2.0] * 3, [0.0] * 3]),
    ],
)
def test_weights_that_are_too_large_are_truncated_or_leave_out(name, expected):
    logratio = jnp.log(jnp.array([[0.5, 4.0, 1.0], [2.0, 2.0, 1.0]]))
    np.testing.assert_allclose(CORRECTIONS[name](logratio, cap=3.0), expected, rtol=1e-5)
    np.testing.assert_allclose(CORRECTIONS[name](jnp.full((1, 3), 1e4), cap=3.0), [[3.0 if "truncate" in name else 0.0] * 3])


def test_a_bad_response_that_the_policy_has_left_is_left_out():
    logps, behavior = jnp.full((4, 2), -3.0), jnp.array([[-1.0], [-2.9], [-1.0], [-1.0]]) * jnp.ones((4, 2))
    advantages = jnp.array([[-1.0], [-1.0], [1.0], [0.0]]) * jnp.ones((4, 2))
    kept = off_policy_mask(logps, behavior, advantages, jnp.ones((4, 2)), threshold=0.5)
    np.testing.assert_array_equal(kept[:, 0], [0, 1, 1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "cliped"}, "nearest: 'clipped'"),
        ({"level": "tokens"}, "nearest: 'token'"),
        ({"reduction": "token-mean"}, "nearest: 'token_mean'"),
        ({"kl": "k4", "kl_coef": 0.1}, "no kl 'k4'"),
        ({"kl_coef": 0.1}, "with_reference"),
        ({"entropy_coef": 0.1}, "entropy was not scored"),
        ({"entropy_share": 0.2}, "entropy was not scored"),
        ({"correction": "token_mask"}, "behavior_logps"),
        ({"correction": "token_mask", "correction_cap": 2.0, "correction_floor": 2.1}, "correction_cap = 2.0, not 2.1"),
        ({"tau_positive": 1.0}, "neither the surrogate 'clipped' nor the reduction 'sequence_mean' takes tau_positive"),
        ({"ratio_cap": 1.1}, "above 1 \\+ clip_high"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    logps = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=message):
        losses.policy_gradient(Scores(logps), batch_of(logps, advantages=jnp.ones(1)), **options)


@pytest.mark.parametrize("advantages", [None, jnp.ones(3)])
def test_advantages_that_are_missing_or_of_other_rows_are_an_error(advantages):
    logps = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="advantages of the shape"):
        losses.policy_gradient(Scores(logps), batch_of(logps, advantages=advantages))
