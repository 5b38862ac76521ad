"""SmolLM2 writes what transformers makes it write; golden by `third_party/transformers/generate_golden.py`."""

import json
import pathlib

import jax
import numpy as np
import pytest

from ftjax import online, rollout, scoring
from ftjax.hf import load

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "smollm2_greedy.json"


@pytest.mark.slow
def test_greedy_equals_transformers_token_for_token():
    found = load.load("smollm2-135m-instruct", dtype="float32")
    golden = json.loads(GOLDEN.read_text())
    prompts = [np.asarray(one["tokens"], np.int32) for one in golden]
    assert [found.tokenizer(one["prompt"])["input_ids"] for one in golden] == [one["tokens"] for one in golden]
    encoder = rollout.Encoder(found.model, found.tokenizer)
    completion = rollout.generate(found.model, found.params, *rollout.pad(prompts), max_tokens=32, eos_ids=encoder.eos_ids)
    rows = zip(completion.tokens.tolist(), completion.lengths.tolist(), strict=True)
    assert [tokens[:length] for tokens, length in rows] == [one["completion"] for one in golden]
    engine = rollout.Engine(found.model, encoder.eos_ids, slots=2)  # fewer than prompts, so that some join later
    samples = engine.generate(found.params, [rollout.Request(prompt, 32) for prompt in prompts])
    assert [sample.tokens.tolist() for sample in samples] == [one["completion"] for one in golden]


@pytest.mark.slow
def test_the_sampler_says_of_real_text_what_the_trainer_says():
    """Through a cache attention adds in another order: docs/online.md says by how much."""
    found = load.load("smollm2-135m-instruct", dtype="float32")
    prompts = [np.asarray(one["tokens"], np.int32) for one in json.loads(GOLDEN.read_text())]
    drawn = rollout.settings(temperature=1.0)
    requests = [rollout.Request(prompt, 32, sampling=drawn, key=jax.random.key(n)) for n, prompt in enumerate(prompts)]
    samples = rollout.Engine(found.model, slots=2).generate(found.params, requests)
    batch = online.rows(prompts, samples, max_tokens=512)
    said = jax.jit(lambda params, batch: scoring.score(found.model, params, batch).logps)(found.params, batch)
    gap = online.disagreement(batch.behavior_logps, said, batch.loss_mask)
    assert 0 < gap.mean < 1e-5 and gap.most < 1e-4, gap
