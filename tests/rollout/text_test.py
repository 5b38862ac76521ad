"""Text in, text out: order, batches, stop strings and streams change nothing that they should not."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ftjax import models, rollout
from ftjax.hf.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
QUESTION = [{"role": "user", "content": "hi"}]


@functools.lru_cache
def tiny():
    model = models.build(models.preset("tiny-llama"))
    params = jax.jit(model.init)(jax.random.key(1))
    return model, jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)


def complete(prompts, **options):
    return rollout.generate_text(*tiny(), TOKENIZER, prompts, **{"max_tokens": 12, "batch_size": 2, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_order_and_batches_change_nothing(temperature, key):
    prompts = ["a longer prompt", "short", "middling"]
    options = {"temperature": temperature, "key": key}
    found = complete(prompts, **options)
    assert len(set(found)) == 3
    assert complete(prompts, batch_size=3, **options) == found
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(3))
    backwards = complete(prompts[::-1], temperature=temperature, key=keys[::-1])
    assert backwards == found[::-1]


def test_text_messages_and_ids_say_the_same():
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    text, messages, ids = complete([rendered, QUESTION, np.asarray(TOKENIZER.encode(rendered))])
    assert text == messages == ids


@pytest.mark.parametrize("stop", ["", "inside"])
@pytest.mark.parametrize("block", [1, 5])
def test_a_stream_joined_is_the_completion(stop, block):
    model, params = tiny()
    (free,) = complete([QUESTION])
    stops = (free[3:5],) if stop else ()
    (expected,) = complete([QUESTION], stop=stops)
    pieces = rollout.stream_text(
        model, params, rollout.Encoder(model, TOKENIZER), QUESTION, max_tokens=12, sampling=rollout.settings(), stop=stops, block=block
    )
    assert "".join(pieces) == expected
    assert expected == (free[: free.index(stops[0])] if stop else free)


@pytest.mark.parametrize("block", [1, 4, 12])
def test_a_stream_ends_at_the_first_token_that_completes_a_text_whatever_else_it_may_complete(block):
    model, params = tiny()
    (free,) = complete([QUESTION])
    stops = (free[4:6], free[2:8])  # the second begins before the first and is complete after it
    encoder = rollout.Encoder(model, TOKENIZER)
    options = {"max_tokens": 12, "sampling": rollout.settings(), "stop": stops, "block": block}
    assert "".join(rollout.stream_text(model, params, encoder, QUESTION, **options)) == complete([QUESTION], stop=stops)[0] == free[:4]


def test_what_is_not_for_each_prompt_is_named(key):
    with pytest.raises(ValueError, match="generate_text: 1 adapters for 2 prompts"):
        complete(["a", "b"], adapters=[0])
    with pytest.raises(ValueError, match="generate_text: 3 keys for 2 prompts"):
        complete(["a", "b"], temperature=1.0, key=jax.random.split(key, 3))
    with pytest.raises(ValueError, match="stream_text: stop is a tuple of texts that are not empty"):
        list(rollout.stream_text(*tiny(), rollout.Encoder(tiny()[0], TOKENIZER), "a", max_tokens=2, sampling=rollout.settings(), stop="a"))


def test_a_stream_heeds_penalties():
    """It is what the engine writes, which with a penalty beyond any logit has no token twice."""
    (model, params), encoder, prompt = tiny(), rollout.Encoder(tiny()[0], TOKENIZER), np.arange(65, 70)
    sampling = rollout.settings(presence_penalty=1e4)
    pieces = rollout.stream_text(model, params, encoder, prompt, max_tokens=12, sampling=sampling, block=3)
    engine = rollout.Engine(model, encoder.eos_ids, slots=1)
    (sample,) = engine.generate(params, [rollout.Request(prompt, 12, sampling=sampling)])
    assert "".join(pieces) == TOKENIZER.decode(sample.tokens.tolist(), skip_special_tokens=True) != complete([prompt])[0]
    assert len(set(sample.tokens.tolist())) == len(sample.tokens) > 2


def test_no_prompts_give_no_texts():
    assert complete([]) == []


def test_the_end_of_an_assistants_turn_ends_a_completion():
    model, _ = tiny()
    end, other = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = dataclasses.replace(model.config, eos_token_id=(3, other))
    unnamed = byte_tokenizer()
    unnamed.eos_token = None
    assert rollout.Encoder(model._replace(config=config), unnamed).eos_ids == (3, end, other)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 2 of 2: the prompt is empty"),
        ([{"role": "usr", "content": "x"}], "no role 'usr'; nearest: 'user'"),
        ([{"role": "user"}], "a message is an object with role and content"),
        ("x" * 5000, r"prompt 2 of 2: 5,000 tokens and max_tokens 12 exceed the model's context of"),
    ],
    ids=["empty", "role", "content", "long"],
)
def test_a_prompt_that_cannot_be_used_is_numbered(prompt, message):
    with pytest.raises(ValueError, match=message):
        complete(["fine", prompt])
