"""Samples are functions of prompt and key alone, and lie in rows as a trainer reads them."""

import dataclasses

import jax
import numpy as np
import pytest

from ftjax import data, online, rollout
from tests import tiny

PROMPTS = [np.arange(1, 4), np.arange(2, 8), np.array([5]), np.arange(3, 7), np.array([9, 9])]
ASKED = [data.Prompt(tokens, data.Example()) for tokens in PROMPTS]


def sampler(slots: int, **settings) -> online.Sampler:
    engine = rollout.Engine(tiny.MODEL, (3,), slots=slots, slot_tokens=16)
    return online.sampler(engine, max_tokens=5, sampling=rollout.settings(temperature=1.0, **settings))


@pytest.fixture(scope="module")
def params():
    return tiny.init(jax.random.key(1))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(2), (len(PROMPTS), 1))


@pytest.fixture(scope="module")
def samples(params, keys):
    return sampler(5)(params, ASKED, keys)


def test_neither_neighbours_nor_slots_change_a_sample(params, keys, samples):
    few = sampler(2)(params, ASKED, keys)
    for one, other in zip(samples, few, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.behavior_logps, other.behavior_logps, atol=1e-5)
    for one in samples:
        ended = one.tokens.tolist().index(3) + 1 if 3 in one.tokens else 5
        assert len(one.tokens) == len(one.logps) == ended and one.finished == (3 in one.tokens)
    assert {one.finished for one in samples} == {True, False}


def test_a_group_has_its_prompt_and_keys_of_its_own(params, keys, samples):
    pairs = sampler(5)(params, ASKED[:2], jax.numpy.concatenate([keys[:2], keys[2:4]], axis=1))
    assert len(pairs) == 4
    for one, other in zip(pairs[::2], samples[:2], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert pairs[0].tokens.tolist() != pairs[1].tokens.tolist()


class Letters:
    """Token 1 is "b", 2 is "c" and so on."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(ord("a") + token) for token in tokens)


def test_stop_texts_end_samples_and_words_are_what_stands_before_them(params, keys, samples):
    engine = rollout.Engine(tiny.MODEL, (3,), tokenizer=Letters(), slots=5, slot_tokens=16)
    texts = [online.words(sample, Letters().decode) for sample in samples]
    ends = (texts[0][1], texts[1][1:3])
    found = online.sampler(engine, max_tokens=5, sampling=rollout.settings(temperature=1.0), stop=ends)(params, ASKED, keys)
    for sample, one, text in zip(found, samples, texts, strict=True):
        cut = min((at for end in ends if (at := text.find(end)) >= 0), default=None)
        assert online.words(sample, Letters().decode, stop=ends) == text[:cut]
        assert sample.finished == (one.finished or cut is not None)
        np.testing.assert_array_equal(sample.tokens, one.tokens[: len(sample.tokens)])  # the same draws
        np.testing.assert_allclose(sample.behavior_logps, one.behavior_logps[: len(sample.tokens)], atol=1e-5)
    assert {sample.reason for sample in found} >= {"stop"}


def test_until_min_tokens_the_behavior_is_the_models_without_its_ends(params, keys):
    engine = rollout.Engine(tiny.MODEL, (3,), slots=5, slot_tokens=16)
    found = online.sampler(engine, max_tokens=5, sampling=rollout.settings(temperature=1.0), min_tokens=3)(params, ASKED, keys)
    for prompt, sample in zip(PROMPTS, found, strict=True):
        assert len(sample.tokens) >= 3
        whole = np.concatenate([prompt, sample.tokens])[None]
        logits = np.asarray(tiny.MODEL.unembed(tiny.MODEL.head(params), tiny.MODEL.apply(params, jax.numpy.asarray(whole))[0]), np.float64)[
            0
        ]
        for at, token in enumerate(sample.tokens):
            probabilities = np.exp(logits[len(prompt) - 1 + at])
            whole_mass, left = probabilities.sum(), probabilities.sum() - (probabilities[3] if at < 3 else 0)
            assert sample.logps[at] == pytest.approx(np.log(probabilities[token] / whole_mass), abs=1e-5)
            assert sample.behavior_logps[at] == pytest.approx(np.log(probabilities[token] / left), abs=1e-5)


def test_rows_hold_prompt_and_completion_and_count_what_was_written(samples):
    batch = online.rows(PROMPTS, samples, max_tokens=64)
    assert batch.tokens.shape == (5, 16)
    for row, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        whole = np.concatenate([prompt, sample.tokens])
        np.testing.assert_array_equal(batch.tokens[row], np.pad(whole, (0, 16 - len(whole))))
        written = np.arange(16) >= len(prompt)
        real = np.arange(16) < len(whole)
        np.testing.assert_array_equal(batch.segment_ids[row], real)
        np.testing.assert_array_equal(batch.loss_mask[row], real & written)
        np.testing.assert_array_equal(batch.positions[row], np.where(real, np.arange(16), 0))
        np.testing.assert_array_equal(batch.behavior_logps[row][batch.loss_mask[row] > 0], sample.behavior_logps)


def test_rows_are_no_wider_than_asked_and_leave_out_what_was_cut(samples):
    batch = online.rows(PROMPTS, samples, max_tokens=12, mask_truncated=True)
    assert batch.tokens.shape == (5, 12)
    assert [bool(row.any()) for row in batch.loss_mask] == [sample.finished for sample in samples]


def test_what_a_policy_was_told_is_read_and_counts_nowhere():
    drawn = np.array([True, True, False, False, False, True])
    logps = np.where(drawn, -1.0, 0.0).astype(np.float32)
    sample = rollout.Sample(np.arange(10, 16), logps, logps, "eos", rollout.Episode(drawn, (), None))
    cut = dataclasses.replace(sample, reason="turns")
    batch = online.rows([np.array([1, 2]), np.array([3])], [sample, cut], max_tokens=64, mask_truncated=True)
    np.testing.assert_array_equal(batch.tokens[0, :9], [1, 2, 10, 11, 12, 13, 14, 15, 0])
    np.testing.assert_array_equal(batch.loss_mask[0, :9], [0, 0, 1, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(batch.behavior_logps[0, :9], [0, 0, -1, -1, 0, 0, 0, -1, 0])
    assert not batch.loss_mask[1].any() and batch.segment_ids[0].sum() == 8
