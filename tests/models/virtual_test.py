"""Virtual tokens are tokens: a prompt of embeddings is the text, a prefix of its keys is its past, and nothing else notices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models
from tests.models.laws_test import CLOSE, hidden, model_of, tokens_of

BOTH = ("prefix", "prompt")
cases = pytest.mark.parametrize(
    ("name", "kinds"),  # without a window, with one everywhere, and with both and scaled embeddings
    [("tiny-llama", ("prompt",)), ("tiny-llama", ("prefix",)), ("tiny-mistral", BOTH), ("tiny-gemma3", BOTH)],
    ids=["llama_prompt", "llama_prefix", "mistral_both", "gemma3_both"],
)
N = 5


def with_text(model, params, ids, kinds):
    """Return the parameters with virtual tokens made of a text: the first N of it as a prefix where there are both."""
    params, rest = dict(params), ids
    if "prefix" in kinds:
        first, rest = (ids[:N], ids[N:]) if "prompt" in kinds else (ids, ids[:0])
        prefix = jax.jit(functools.partial(models.prefix_of, model))(params, first)
        params["layers"] = {**params["layers"], "slots": {"prefix": prefix}}
    if "prompt" in kinds:
        params["prompt"] = {"embedding": params["embed_tokens"]["kernel"][rest]}
    return params


def case(name, kinds, key, rows=2, t=20):
    model, params = model_of(name)
    ids = tokens_of(jax.random.fold_in(key, 1), t=N * len(kinds), rows=1)[0]
    tokens = tokens_of(key, t=t, rows=rows)
    text = jnp.concatenate([jnp.broadcast_to(ids[None], (rows, len(ids))), tokens], axis=1)
    return model, params, with_text(model, params, ids, kinds), tokens, text, len(ids)


@cases
def test_virtual_tokens_made_of_a_text_are_the_text(name, kinds, key):
    model, params, virtual, tokens, text, n = case(name, kinds, key)
    actual = hidden(model, virtual, tokens)
    np.testing.assert_allclose(actual, hidden(model, params, text)[:, n:], **CLOSE)
    assert np.abs(actual - hidden(model, params, tokens)).max() > 0.01


@cases
def test_cached_decoding_behind_virtual_tokens_equals_the_full_forward(name, kinds, key):
    model, _, virtual, tokens, _, n = case(name, kinds, key)
    step = jax.jit(model.apply)
    cache, outs = models.init_cache(model.config, 2, 23), []
    for start, stop in [(0, 12), *((i, i + 1) for i in range(12, 20))]:
        out, cache = step(virtual, tokens[:, start:stop], cache=cache)
        outs.append(out)
        assert (int(cache.index), cache.virtual, cache.k.shape[3]) == (n + stop, n, n + 23)  # written once, in slots of their own
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), hidden(model, virtual, tokens), **CLOSE)


@pytest.mark.parametrize(
    ("name", "first", "kinds"),  # the second document is in the first block of queries, or behind it
    [("tiny-llama", 9, ("prefix",)), ("tiny-mistral", 130, ("prompt",)), ("tiny-mistral", 130, BOTH)],
    ids=["llama_prefix", "mistral_prompt", "mistral_both"],
)
def test_every_document_of_a_row_sees_them(name, first, kinds, key):
    model, _, virtual, tokens, _, _ = case(name, kinds, key, rows=1, t=first + 11 + 3)
    ends = np.cumsum([3, first, 11])
    segments = np.searchsorted(ends, np.arange(ends[-1]), side="right").astype(np.int32)[None]  # three of padding, two documents
    positions = (np.arange(ends[-1]) - np.array([0, *ends])[segments[0]]).astype(np.int32)[None]
    packed = hidden(model, virtual, tokens, positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments))
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        alone = hidden(model, virtual, tokens[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, **CLOSE)


def test_gradients_reach_them_and_rematerialisation_changes_nothing(key):
    model, _, virtual, tokens, _, _ = case("tiny-llama", BOTH, key)
    trained = {"prompt": virtual["prompt"], "slots": virtual["layers"]["slots"]}

    def loss(trained, model):
        params = {**virtual, "layers": {**virtual["layers"], "slots": trained["slots"]}, "prompt": trained["prompt"]}
        return jnp.sum(jnp.sin(model.apply(params, tokens)[0]))

    gradient = jax.jit(jax.grad(lambda trained: loss(trained, model)))(trained)
    other = jax.jit(jax.grad(lambda trained: loss(trained, model_of("tiny-llama", remat="elementwise")[0])))(trained)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        assert jnp.all(jnp.any(one != 0, axis=-1))
        np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(one).max(), rtol=0)


def test_a_cache_begun_with_other_virtual_tokens_is_refused(key):
    model, params, virtual, tokens, _, _ = case("tiny-llama", ("prompt",), key)
    _, cache = jax.jit(model.apply)(virtual, tokens, cache=models.init_cache(model.config, 2, 30))
    with pytest.raises(ValueError, match="begun with 5 virtual tokens and the parameters hold 0"):
        model.apply(params, tokens[:, :1], cache=cache)
