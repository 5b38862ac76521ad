"""SmolLM2 writes what transformers makes it write; golden by `third_party/transformers/generate_golden.py`."""

import json
import pathlib

import numpy as np
import pytest

from ftjax import rollout
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
