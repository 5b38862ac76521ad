from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.scoring import score
from ftjax.types import Batch
from tests import toy


@pytest.fixture
def params(key):
    return toy.init(key)


@pytest.mark.parametrize("packed", [False, True])
def test_logps_are_those_of_the_next_token_within_a_document(key, params, packed):
    batch = toy.batch(key, packed=packed)
    hidden, _ = toy.apply(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    logps = jax.nn.log_softmax(hidden @ params["embed_tokens"]["kernel"].T)
    rows, columns = np.nonzero(np.asarray(batch.loss_mask))
    scores = score(toy.MODEL, params, batch, chunk_tokens=3)
    np.testing.assert_allclose(scores.logps[rows, columns], logps[rows, columns - 1, batch.tokens[rows, columns]], rtol=1e-5)
    assert float(jnp.abs(scores.logps * (1 - batch.loss_mask)).max()) == 0


def test_a_document_is_never_scored_from_its_neighbour(key, params):
    batch = toy.batch(key, packed=True)
    everything = Batch(batch.tokens, jnp.ones_like(batch.loss_mask), batch.positions, batch.segment_ids)
    starts = np.asarray(batch.positions == 0) | np.asarray(batch.positions == batch.tokens.shape[1] // 2)
    assert float(jnp.abs(jnp.where(starts, score(toy.MODEL, params, everything).logps, 0.0)).max()) == 0


def test_pairs_are_an_axis_like_any_other(key, params):
    flat = toy.batch(key, rows=6)
    pairs = jax.tree.map(lambda x: x.reshape(3, 2, -1), flat)
    scored = score(toy.MODEL, params, pairs)
    np.testing.assert_allclose(scored.logps.reshape(6, -1), score(toy.MODEL, params, flat).logps, rtol=1e-6)


def test_padding_and_the_tokens_in_it_change_nothing(key, params):
    batch = toy.batch(key)
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 1), (0, 4))), batch)
    wide = Batch(wide.tokens.at[:, -1].set(toy.VOCAB - 1), wide.loss_mask, wide.positions, wide.segment_ids)
    got, expected = (score(toy.MODEL, params, b, chunk_tokens=2) for b in (wide, batch))
    np.testing.assert_allclose(got.logps[:-1, :-4], expected.logps, rtol=1e-6)
    assert float(jnp.abs(got.logps[-1]).max()) == 0


def test_only_what_is_asked_for_is_returned(key, params):
    scores = score(toy.MODEL, params, toy.batch(key), outputs=("mean_logps",))
    assert scores.mean_logps is not None and scores.logps is not None and scores.entropy is None and scores.greedy is None


def test_the_default_chunk_bounds_the_logits(key, params, monkeypatch):
    sizes = []
    spy = toy.MODEL._replace(unembed=lambda head, hidden: (sizes.append(hidden.shape[:-1]), toy.unembed(head, hidden))[1])
    monkeypatch.setattr("ftjax.scoring.CHUNK_LOGITS", 4 * toy.VOCAB * 2)
    jax.eval_shape(partial(score, spy), params, toy.batch(key))
    assert (4, 2) in sizes and all(np.prod(shape) * toy.VOCAB <= 4 * toy.VOCAB * 2 for shape in sizes)


def test_a_temperature_divides_the_logits_of_all_that_is_said(key, params):
    """Logits, log-probabilities, entropies and the gradient of the embedding, which is the head as well, against the whole logits."""
    batch = toy.batch(key)

    def plain(params, temperature):
        hidden, _ = toy.apply(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        logps = jax.nn.log_softmax(toy.unembed(toy.head(params), hidden[:, :-1]) / temperature)
        chosen = jnp.take_along_axis(logps, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return chosen * batch.loss_mask[:, 1:], -jnp.sum(jnp.exp(logps) * logps, axis=-1) * batch.loss_mask[:, 1:]

    def scored(params, temperature):
        scores = score(toy.MODEL, params, batch, chunk_tokens=3, temperature=temperature)
        return scores.logps[:, 1:], scores.entropy[:, 1:]

    @partial(jax.jit, static_argnums=0)
    def both(temperature):
        weights = jnp.cos(jnp.arange(batch.tokens.shape[1] - 1))[None, :]
        of = lambda f: (f(params, temperature), jax.grad(lambda p: jnp.sum(weights * f(p, temperature)[0]))(params))  # noqa: E731
        return of(scored), of(plain), scored(params, 1.0)

    got, expected, untempered = both(0.7)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)
    assert float(jnp.abs(got[0][0] - untempered[0]).max()) > 0.1


def test_no_temperature_is_an_error(key, params):
    with pytest.raises(ValueError, match="above 0, not 0"):
        score(toy.MODEL, params, toy.batch(key), temperature=0)
