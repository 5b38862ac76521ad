"""Generation: the cache, padding, neighbours and cuts change nothing, and what is reported is what scoring says."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, rollout, scoring
from ftjax.types import Batch

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
UNUSED = -1  # no token

programs = importlib.import_module("ftjax.rollout.generate")  # the package has a function of this name


@functools.lru_cache
def tiny(family="llama"):
    model = models.build(models.preset(f"tiny-{family}"))
    params = jax.jit(model.init)(jax.random.key(1))
    # Larger weights than training starts from, so that greedy completions are not one token over and over.
    return model, jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)


def prompts(count, length, seed=0):
    return [np.random.default_rng([seed, n]).integers(10, 250, length + n).astype(np.int32) for n in range(count)]


def complete(model, params, rows, *, width=16, num_rows=3, max_tokens=12, eos_ids=(UNUSED,), **options):
    """Generate in rectangles of one shape where nothing else is asked for, so that the tests share their programs."""
    tokens, segment_ids = rollout.pad(rows, rows=num_rows, width=width)
    return rollout.generate(model, params, tokens, segment_ids, max_tokens=max_tokens, eos_ids=eos_ids, **options)


def greedy_without_cache(model, params, prompt, count):
    """Return the tokens that the full forward pass chooses, one by one."""

    @jax.jit
    def choose(tokens, at):
        hidden, _ = model.apply(params, tokens)
        return jnp.argmax(model.unembed(model.head(params), hidden[0, at]))

    row = np.zeros((1, 28), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        row[0, at] = int(choose(row, at - 1))
    return row[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_full_forward_pass(family):
    model, params = tiny(family)
    windows = [window for window in model.config.windows if window]
    rows = prompts(2, 13)
    assert not windows or min(windows) < 13  # the window cuts
    found = complete(model, params, rows)
    expected = [greedy_without_cache(model, params, row, 12) for row in rows]
    assert found.tokens[:2].tolist() == expected
    assert len({*expected[0], *expected[1]}) > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_neighbours_and_batch_shape_change_nothing(temperature, key):
    model, params = tiny()
    rows = prompts(3, 5)
    keys = jax.random.split(key, 4)
    together = complete(model, params, rows, num_rows=4, width=24, key=keys, temperature=temperature)
    for n, row in enumerate(rows):
        alone = complete(model, params, [row], key=keys[jnp.array([n, 3, 3])], temperature=temperature)
        assert alone.tokens[0].tolist() == together.tokens[n].tolist()
        np.testing.assert_allclose(alone.logps[0], together.logps[n], atol=1e-5)
    assert together.lengths.tolist() == [12, 12, 12, 0]  # the row of padding alone
    assert len({tuple(row) for row in together.tokens[:3].tolist()}) == 3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logps_are_those_of_scoring(family, key):
    model, params = tiny(family)
    rows = prompts(3, 9)
    found = complete(model, params, rows, temperature=1.0, key=key)
    width = 9 + 2 + 12
    tokens, mask, segments = np.zeros((3, width), np.int32), np.zeros((3, width), np.float32), np.zeros((3, width), np.int32)
    for n, row in enumerate(rows):
        whole = np.concatenate([row, found.tokens[n]])
        tokens[n, : len(whole)], mask[n, len(row) : len(whole)], segments[n, : len(whole)] = whole, 1, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    scores = scoring.score(model, params, Batch(*map(jnp.asarray, (tokens, mask, positions, segments))))
    expected = np.stack([scores.logps[n, len(row) : len(row) + 12] for n, row in enumerate(rows)])
    np.testing.assert_allclose(found.logps, expected, atol=1e-5)
    np.testing.assert_allclose(found.behavior_logps, found.logps, atol=1e-6)  # at temperature 1, unfiltered


def test_a_row_ends_at_its_eos_and_the_others_go_on():
    model, params = tiny()
    rows = prompts(3, 6)
    free = complete(model, params, rows)
    eos = int(free.tokens[0, 4])
    ends = [row.index(eos) + 1 if eos in row else 12 for row in free.tokens.tolist()]
    found = complete(model, params, rows, eos_ids=(eos,))
    assert found.lengths.tolist() == ends and min(ends) < max(ends)
    assert found.finished.tolist() == [eos in row for row in free.tokens.tolist()]
    for n, end in enumerate(ends):
        assert found.tokens[n, :end].tolist() == free.tokens[n, :end].tolist()
        assert not found.tokens[n, end:].any() and not found.logps[n, end:].any()


def begin(model, params, rows, *, eos_ids=(UNUSED,), sampling=None, key=None):
    tokens, segment_ids = rollout.pad(rows, rows=3, width=16)
    sampling = sampling or rollout.settings()
    return rollout.start(model, params, tokens, segment_ids, max_tokens=12, eos_ids=eos_ids, sampling=sampling, key=key)


def test_decoding_stops_when_all_have_ended():
    model, params = tiny()
    rows = prompts(1, 6)
    first = int(begin(model, params, rows).tokens[0, 0])
    state = begin(model, params, rows, eos_ids=(first,))
    state = rollout.extend(model, params, state, 11, eos_ids=(first,), sampling=rollout.settings())
    assert int(state.step) == 1 and state.lengths.tolist() == [1, 0, 0]


def test_any_cut_of_a_stream_gives_the_same_tokens(key):
    model, params = tiny()
    sampling = rollout.settings(temperature=1.0)
    whole = complete(model, params, prompts(2, 6), temperature=1.0, key=key)
    state = begin(model, params, prompts(2, 6), sampling=sampling, key=key)
    for block in (1, 4, 2, 99):  # the last has no room for all
        state = rollout.extend(model, params, state, block, eos_ids=(UNUSED,), sampling=sampling)
    assert state.tokens.tolist() == whole.tokens.tolist()
    assert state.logps.tolist() == whole.logps.tolist()
    assert int(state.step) == 12


PENALTIES = [{"repetition_penalty": 3.0}, {"frequency_penalty": 20.0}, {"presence_penalty": 20.0}]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: next(iter(penalty)))
def test_penalties_act_as_in_the_engine_and_in_any_cut(penalty):
    """A row is its prompt, its padding not seen, and what it wrote; the rows beside it change nothing."""
    model, params = tiny()
    rows, sampling = [*prompts(2, 6), np.full(9, 7, np.int32)], rollout.settings(**penalty)
    requests = [rollout.Request(row, 12, sampling=sampling) for row in rows]
    wanted = [sample.tokens.tolist() for sample in rollout.Engine(model, (UNUSED,), slots=3, slot_tokens=32).generate(params, requests)]
    assert wanted != complete(model, params, rows).tokens.tolist()
    state = begin(model, params, rows, sampling=sampling)
    for block in (1, 4, 99):
        state = rollout.extend(model, params, state, block, eos_ids=(UNUSED,), sampling=sampling)
    assert state.tokens.tolist() == wanted


def test_penalties_that_come_after_the_beginning_are_refused():
    model, params = tiny()
    state = begin(model, params, prompts(1, 4))
    with pytest.raises(ValueError, match="extend: .* presence_penalty .* start"):
        rollout.extend(model, params, state, 2, sampling=rollout.settings(presence_penalty=1.0))


def test_one_pair_of_programs_for_each_shape(key):
    model, params = tiny()

    def counts():
        return programs._prefill._cache_size(), programs._decode._cache_size()

    complete(model, params, prompts(2, 5), width=None, temperature=1.0, key=key)
    before = counts()
    complete(model, params, prompts(2, 9), width=None, temperature=0.3, key=jax.random.key(5), eos_ids=(2,))  # the same bucket
    assert counts() == before
    complete(model, params, prompts(2, 23), width=None, temperature=1.0, key=key)
    assert counts() == (before[0] + 1, before[1] + 1)


def test_the_cache_is_updated_in_place():
    model, params = tiny()
    state = begin(model, params, prompts(2, 6))
    text = programs._decode.lower(model, params, state, 7, jnp.zeros(1, jnp.int32), rollout.settings()).compile().as_text()
    shape = ",".join(map(str, state.cache.k.shape))
    copies = [line for line in text.splitlines() if " copy(" in line and f"[{shape}]" in line]
    assert f"[{shape}]" in text and not copies


def test_an_unmerged_adapter_generates_as_the_merged_model(key):
    model, params = tiny()
    method = peft.lora("all-linear", rank=4, alpha=64, dropout=0.5)
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), trainable)
    rows = prompts(2, 6)
    adapted = complete(model, method.attach(frozen, trainable), rows)
    assert adapted.tokens.tolist() == complete(model, peft.merge(method, frozen, trainable), rows).tokens.tolist()
    assert adapted.tokens.tolist() != complete(model, params, rows).tokens.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_behind_virtual_tokens_greedy_equals_the_full_forward_pass_and_padding_changes_nothing(family, key):
    model, params = tiny(family)
    method = peft.chain(peft.prefix_tuning(3), peft.prompt_tuning(4))
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), trainable)
    rows, prompted = prompts(2, 6), method.attach(frozen, trainable)
    found = complete(model, prompted, rows).tokens[:2].tolist()
    assert found == [greedy_without_cache(model, prompted, row, 12) for row in rows]
    assert found != complete(model, params, rows).tokens[:2].tolist()
    assert found == complete(model, prompted, rows, width=24, num_rows=4).tokens[:2].tolist()


@pytest.mark.parametrize("method", [peft.lora("all-linear", rank=4, dropout=0.5), peft.neftune(5.0)], ids=["dropout", "noise"])
def test_dropout_and_noise_are_refused(method, key):
    model, params = tiny()
    frozen, trainable = method.init(key, params)
    with pytest.raises(ValueError, match="without a key"):
        complete(model, method.attach(frozen, trainable, key=key), prompts(1, 4))
    complete(model, method.attach(frozen, trainable), prompts(1, 4))


def test_bfloat16_keeps_a_bfloat16_cache_and_float32_logps():
    model, params = tiny()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state = begin(model, params, prompts(1, 4))
    assert (state.cache.k.dtype, state.logps.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(("options", "message"), [({"max_tokens": 0}, "at least 1"), ({"temperature": 1.0}, "needs a key")])
def test_what_cannot_be_done_is_said(options, message):
    model, params = tiny()
    with pytest.raises(ValueError, match=message):
        complete(model, params, prompts(1, 4), **options)
