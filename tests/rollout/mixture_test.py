"""A mixture of two models, sampled through slots and caches, is the mixture of what the two say without any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import rollout, sharding
from tests import tiny

PROMPTS = [np.arange(1, 1 + n) for n in (3, 6, 1, 4)]
KEYS = jax.random.split(jax.random.key(2), (len(PROMPTS), 2))


@pytest.fixture(scope="module")
def models():
    """The policy and its reference."""
    return tuple(tiny.init(jax.random.key(n)) for n in (1, 5))


def samples(model, params, slots=3):
    """Two to each prompt, through fewer slots than there are samples."""
    engine = rollout.Engine(model, (3,), slots=slots, slot_tokens=16)
    sampling = rollout.settings(temperature=1.0)
    requests = [rollout.Request(prompt, 8, key=key, num_samples=2, sampling=sampling) for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    return engine.generate(params, requests)


def said(params, prompt, tokens) -> np.ndarray:
    """What a model says of every token of the vocabulary at each place of a completion, by one pass over the whole text, `[n, v]`."""
    text = jnp.asarray([*prompt, *tokens])[None]
    hidden, _ = tiny.apply(params, text)
    logits = np.asarray(tiny.MODEL.unembed(tiny.MODEL.head(params), hidden), np.float64)[0, len(prompt) - 1 : -1]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_what_is_drawn_from_is_the_normalised_product_of_powers(models):
    share = 0.3
    for at, sample in enumerate(samples(rollout.geometric(tiny.MODEL, share=share), rollout.both(*models))):
        ours, theirs = (said(params, PROMPTS[at // 2], sample.tokens) for params in models)
        product = np.exp(ours) ** (1 - share) * np.exp(theirs) ** share
        logps = np.log(product / product.sum(axis=-1, keepdims=True))[np.arange(len(sample.tokens)), sample.tokens]
        np.testing.assert_allclose(sample.behavior_logps, logps, atol=2e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_at_its_ends_a_mixture_writes_what_one_of_the_two_does(share, models):
    mixed = samples(rollout.geometric(tiny.MODEL, share=share), rollout.both(*models))
    for found, expected in zip(mixed, samples(tiny.MODEL, models[int(share)]), strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()


def test_a_share_of_more_than_all_is_refused():
    with pytest.raises(ValueError, match=r"the share of the reference is in \[0, 1\], not 1.5"):
        rollout.geometric(tiny.MODEL, share=1.5)


def test_eight_devices_write_what_one_writes(models):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = rollout.geometric(sharding.on_mesh(tiny.MODEL, mesh), share=0.5)
    placed = [sharding.place(jax.tree.map(np.asarray, params), mesh) for params in models]
    alone = samples(rollout.geometric(tiny.MODEL, share=0.5), rollout.both(*models), slots=4)
    for one, other in zip(samples(spread, rollout.both(*placed), slots=4), alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
