"""Beam search: every completion where beams hold them all, greedy where there is one and no end, each prompt for itself, transformers'."""

import json

import jax
import numpy as np
import pytest

from ftjax import rollout
from tests import tiny, toy
from tests.models.logits_test import GOLDENS, golden

END = 3
PROMPTS = [np.array([5, 1, 9, 2]), np.array([7, 7])]
GOLDEN = json.loads((GOLDENS / "beams.json").read_text())  # by third_party/transformers/beams.py


@pytest.fixture(scope="module")
def params():
    return tiny.init(jax.random.key(4))


@pytest.fixture(scope="module")
def llama():
    _, model, params, *_ = golden("llama")
    return model, params


def search(params, prompts, **options):
    rows = rollout.pad(prompts, rows=2, width=4)
    return rollout.beam_search(tiny.MODEL, params, *rows, **{"max_tokens": 2, "eos_ids": (END,), **options})


def every_pair(params, prompt):
    """Return the log-probabilities `[v]` of one token and `[v, v]` of two."""
    rows = np.stack([np.append(prompt, token) for token in range(toy.VOCAB)]).astype(np.int32)
    hidden, _ = jax.jit(tiny.MODEL.apply)(params, rows)
    logps = jax.nn.log_softmax(tiny.MODEL.unembed(tiny.MODEL.head(params), hidden[:, -2:]))
    first = np.asarray(logps[0, 0])
    return first, first[:, None] + np.asarray(logps[:, 1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -2.0])
def test_with_as_many_beams_as_tokens_the_best_of_all_completions_are_found(length_penalty, params):
    found = search(params, PROMPTS, num_beams=toy.VOCAB, length_penalty=length_penalty)
    for n, prompt in enumerate(PROMPTS):
        first, pairs = every_pair(params, prompt)
        scores = {(END,): first[END]}
        scores |= {(i, j): pairs[i, j] / 2**length_penalty for i in range(toy.VOCAB) for j in range(toy.VOCAB) if i != END}
        best = sorted(scores, key=scores.get, reverse=True)[: toy.VOCAB]
        rows = zip(found.tokens[n].tolist(), found.lengths[n].tolist(), strict=True)
        assert [tuple(tokens[:length]) for tokens, length in rows] == best
        np.testing.assert_allclose(found.scores[n], [scores[one] for one in best], atol=1e-5)


def test_one_beam_without_an_end_is_greedy(params):
    found = search(params, PROMPTS, num_beams=1, max_tokens=6, eos_ids=())
    greedy = rollout.generate(tiny.MODEL, params, *rollout.pad(PROMPTS, rows=2, width=4), max_tokens=6)
    assert found.tokens[:, 0].tolist() == greedy.tokens.tolist() and found.lengths.tolist() == [[6], [6]]
    np.testing.assert_allclose(found.scores[:, 0], np.asarray(greedy.logps).mean(axis=1), atol=1e-5)


def test_neighbours_change_nothing(params):
    together = search(params, PROMPTS, num_beams=3, max_tokens=6)
    for n, prompt in enumerate(PROMPTS):
        alone = search(params, [prompt], num_beams=3, max_tokens=6)
        assert alone.tokens[0].tolist() == together.tokens[n].tolist()
        np.testing.assert_allclose(alone.scores[0], together.scores[n], atol=1e-5)


@pytest.mark.parametrize(
    "search",
    GOLDEN["searches"],
    ids=lambda search: f"{search['num_beams']} beams, {len(search['eos_ids'])} ends, length penalty {search['length_penalty']}",
)
def test_beams_are_those_of_transformers(search, llama):
    """Searched for side by side here, each prompt alone there; with many ends some of the prompts are done after two tokens."""
    prompts = rollout.pad([np.asarray(prompt, np.int32) for prompt in GOLDEN["prompts"]])
    options = {name: search[name] for name in ("num_beams", "eos_ids", "length_penalty")}
    found = rollout.beam_search(*llama, *prompts, max_tokens=GOLDEN["max_tokens"], **options)
    for tokens, lengths, beams in zip(found.tokens.tolist(), found.lengths.tolist(), search["beams"], strict=True):
        assert [row[:length] for row, length in zip(tokens, lengths, strict=True)] == beams
    np.testing.assert_allclose(found.scores, search["scores"], rtol=1e-5)


@pytest.mark.parametrize("name", ["num_beams", "max_tokens"])
def test_a_number_out_of_range_is_named(name, params):
    with pytest.raises(ValueError, match=f"{name} is at least 1, not 0"):
        search(params, PROMPTS, **{"num_beams": 2, name: 0})
