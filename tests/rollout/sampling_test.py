"""Samplers: what they may choose, how often, with what log-probability, whatever stands beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ftjax.rollout import Sampling, Seen, sample, settings
from ftjax.rollout import sampling as samplers
from ftjax.rollout.sampling import NEUTRAL, keep_min_p, keep_top_k, keep_top_p, penalize, stack, warp

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32)  # in order: 1, 3, 4, 2, 0
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))
# The 99.9th percentile of chi-square with 1, 2, 3 and 4 degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}


def kept(logits):
    return set(np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist())


@pytest.mark.parametrize(("k", "expected"), [(1, {1}), (2, {1, 3}), (4, {1, 2, 3, 4}), (5, {0, 1, 2, 3, 4}), (99, {0, 1, 2, 3, 4})])
def test_top_k_keeps_the_k_largest(k, expected):
    assert kept(keep_top_k(LOGITS[None], k)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.1, {1}), (0.39, {1}), (0.41, {1, 3}), (0.7, {1, 3, 4}), (0.96, {0, 1, 2, 3, 4})])
def test_top_p_keeps_the_fewest_that_have_the_mass(p, expected):
    assert kept(keep_top_p(LOGITS[None], p)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.99, {1}), (0.6, {1, 3}), (0.45, {1, 3, 4}), (0.1, {0, 1, 2, 3, 4})])
def test_min_p_is_relative_to_the_likeliest(p, expected):
    assert kept(keep_min_p(LOGITS[None], p)) == expected


def test_ties_with_the_last_kept_stay():
    assert kept(keep_top_k(jnp.asarray([[1.0, 2.0, 1.0, 0.0]]), 2)) == {0, 1, 2}


def test_thresholds_equal_a_sort_for_any_logits(key):
    logits = jax.random.normal(key, (16, 301)) * 20.0  # of both signs
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    np.testing.assert_array_equal(jnp.isfinite(keep_top_k(logits, 17)), logits >= ordered[:, 16:17])
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    last = jnp.take_along_axis(ordered, jnp.argmax(mass >= 0.9, axis=-1)[:, None], axis=-1)
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(logits, 0.9)), logits >= last)


def test_each_setting_sees_what_the_one_before_it_left():
    # Of {0.4, 0.25} the first alone has 0.615 of the mass, so top-p 0.6 keeps it; of all five it has 0.4 and would not do.
    assert kept(warp(LOGITS[None], Sampling(1.0, top_k=2, top_p=0.6))) == {1}
    assert kept(warp(LOGITS[None], Sampling(1.0, top_p=0.6))) == {1, 3}
    # At temperature 3 the distribution is flatter, and top-p needs more tokens.
    assert kept(warp(LOGITS[None], Sampling(3.0, top_p=0.6))) == {1, 3, 4}


def test_a_setting_may_differ_from_row_to_row():
    found = warp(jnp.stack([LOGITS, LOGITS]), Sampling(jnp.array([1.0, 1.0]), top_k=jnp.array([1, 2])))
    assert np.isfinite(np.asarray(found)).sum(axis=1).tolist() == [1, 2]


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.7, "min_p": 0.6}],
    ids=str,
)
def test_frequencies_are_those_of_the_reported_distribution(options, key):
    draws = 20_000
    sampling = settings(**options)
    found = jax.jit(sample)(jnp.broadcast_to(LOGITS, (draws, 5)), jax.random.split(key, draws), sampling)
    counts = np.bincount(np.asarray(found.tokens), minlength=5)
    expected = np.zeros(5)
    expected[np.asarray(found.tokens)] = np.exp(np.asarray(found.behavior_logps))
    assert expected.sum() == pytest.approx(1.0, abs=1e-5)  # renormalised over what can be drawn
    support = expected > 0
    assert set(np.flatnonzero(support)) == kept(warp(LOGITS[None], sampling))
    chi_square = np.sum((counts[support] - draws * expected[support]) ** 2 / (draws * expected[support]))
    assert chi_square < CHI_SQUARE[support.sum() - 1]


SEEN = Seen(jnp.asarray([[True, True, False, False, False]]), jnp.asarray([[0, 2, 1, 0, 0]]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Positive logits are divided, negative ones multiplied: tokens 0, 1 of the prompt and 1, 2 of the completion.
        ({"repetition_penalty": 2.0}, [0.5, -4.0, 0.25, -1.0, 3.0]),
        ({"frequency_penalty": 0.25}, [1.0, -2.5, 0.25, -1.0, 3.0]),
        ({"presence_penalty": 0.25}, [1.0, -2.25, 0.25, -1.0, 3.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": -1.0}, [0.5, -5.0, 0.25, -1.0, 3.0]),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_tokens_that_came_before_are_penalised(options, expected):
    logits = jnp.asarray([[1.0, -2.0, 0.5, -1.0, 3.0]])
    assert penalize(logits, SEEN, settings(**options)).tolist() == [expected]
    assert penalize(logits, SEEN, NEUTRAL).tolist() == logits.tolist()


def test_penalties_come_before_the_greedy_choice_and_the_reported_distribution(key):
    logits = jnp.asarray([[1.0, 2.0, 1.9, 0.0, 0.5]])
    assert sample(logits, key[None], settings(presence_penalty=0.5), seen=SEEN).tokens.tolist() == [1]
    assert sample(logits, key[None], settings(frequency_penalty=0.5), seen=SEEN).tokens.tolist() == [2]
    draws = 20_000
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, 5)), (logits, SEEN))
    found = jax.jit(sample)(many[0], jax.random.split(key, draws), settings(temperature=1.0, frequency_penalty=0.5), seen=many[1])
    expected = draws * np.asarray(jax.nn.softmax(jnp.asarray([1.0, 1.0, 1.4, 0.0, 0.5])))
    counts = np.bincount(np.asarray(found.tokens), minlength=5)
    assert np.sum((counts - expected) ** 2 / expected) < CHI_SQUARE[4]
    np.testing.assert_allclose(np.exp(found.behavior_logps), (expected / draws)[found.tokens], rtol=1e-5)


def test_tokens_are_drawn_with_their_probabilities_from_all_blocks(key):
    """300 tokens, the last 44 in a block that is not full, and every other one impossible: chi-square over 40,000 draws."""
    logits = jnp.where(jnp.arange(300) % 2 == 0, 2 * jax.random.normal(key, (300,)), -jnp.inf)
    tokens = jax.jit(samplers.drawn)(jnp.broadcast_to(logits, (40_000, 300)), jax.random.split(key, 40_000))
    found, expected = np.bincount(tokens, minlength=300), 40_000 * np.asarray(jax.nn.softmax(logits), np.float64)
    assert len(found) == 300 and not found[1::2].any()
    big = expected > 5
    statistic = np.sum((found[big] - expected[big]) ** 2 / expected[big])
    assert statistic < scipy.stats.chi2.ppf(0.9999, big.sum())


def test_a_draw_never_leaves_what_has_a_probability():
    """The shares 0 and the largest below 1, of weights whose sum is rounded; by hand."""
    weights = jnp.array([[0.0, 1e-3, 0.0, 0.7, 0.0]])
    for share, expected in ((0.0, 1), (0.5, 3), (1 - 2**-24, 3)):
        assert samplers._first_beyond(weights, jnp.array([share]))[0] == expected


@pytest.mark.parametrize("v", [40, 128, 300])
def test_the_likeliest_is_the_first_of_the_largest(v, key):
    logits = jax.random.randint(key, (50, v), -9, 6 if v == 40 else 60).astype(jnp.float32).at[7].set(-jnp.inf)
    np.testing.assert_array_equal(samplers.likeliest(logits), np.argmax(logits, axis=1))
    assert 0 <= samplers.likeliest(logits.at[3, 5].set(jnp.nan))[3] < v


def test_only_what_is_allowed_is_chosen(key):
    allowed = jnp.asarray([[True, False, True, False, False]])
    assert sample(LOGITS[None], key[None], settings(), allowed=allowed).tokens.tolist() == [2]
    drawn = sample(jnp.tile(LOGITS, (64, 1)), jax.random.split(key, 64), settings(temperature=1.0), allowed=jnp.tile(allowed, (64, 1)))
    assert set(drawn.tokens.tolist()) == {0, 2}
    np.testing.assert_allclose(np.exp(drawn.behavior_logps), np.where(drawn.tokens == 0, 1 / 3, 2 / 3), rtol=1e-5)


def test_rows_without_a_setting_that_others_have_are_as_without_it(key):
    rows = [settings(), settings(temperature=0.7), settings(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1)]
    logits, keys = jax.random.normal(key, (3, 301)) * 4.0, jax.random.split(key, 3)
    together = sample(logits, keys, stack(rows))
    for n, row in enumerate(rows):
        alone = sample(logits[n : n + 1], keys[n : n + 1], row)
        assert [x[0].tolist() for x in alone] == [x[n].tolist() for x in together]


def test_reported_logps_are_the_models_and_the_samplers(key):
    found = sample(LOGITS[None], key[None], settings(temperature=0.5, top_k=2))
    token = int(found.tokens[0])
    squared = PROBABILITIES**2
    assert float(found.logps[0]) == pytest.approx(np.log(PROBABILITIES[token]), abs=1e-6)
    assert float(found.behavior_logps[0]) == pytest.approx(np.log(squared[token] / (squared[1] + squared[3])), abs=1e-6)


def test_temperature_zero_is_greedy_and_certain(key):
    found = sample(jnp.stack([LOGITS, -LOGITS]), jax.random.split(key), settings(temperature=0.0, top_k=3))
    assert found.tokens.tolist() == [1, 0]
    assert found.behavior_logps.tolist() == [0.0, 0.0]


def test_neighbours_do_not_change_what_a_row_draws(key):
    keys = jax.random.split(key, 6)
    logits = jax.random.normal(key, (6, 50))
    sampling = settings(temperature=1.0, top_p=0.9)
    together = sample(logits, keys, sampling)
    reversed_ = sample(logits[::-1], keys[::-1], sampling)
    alone = [int(sample(logits[n : n + 1], keys[n : n + 1], sampling).tokens[0]) for n in range(6)]
    assert together.tokens.tolist() == alone == reversed_.tokens.tolist()[::-1]
    assert len(set(alone)) > 1


def test_a_changed_number_compiles_nothing(key):
    jitted = jax.jit(lambda *arguments: sample(*arguments))  # with a cache of its own
    for temperature, top_p in ((0.5, 0.9), (0.7, 0.8)):
        jitted(LOGITS[None], key[None], settings(temperature=temperature, top_p=top_p))
    assert jitted._cache_size() == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        settings(**bad)
