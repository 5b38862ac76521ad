"""A sampler that is not the trainer is found out, and rounding is not, whatever is computed in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import data, online, peft, quant, rollout, scoring
from tests import tiny

PROMPTS = [np.arange(1, 1 + n) for n in (3, 6, 2, 4)] * 4
DTYPES = ["float32", "bfloat16"]
LORA = peft.lora("all-linear", rank=4, alpha=8)
NF4 = quant.nf4("all-linear", group=8)


@pytest.fixture(scope="module")
def weights():
    """`{dtype: parameters}`."""
    params = tiny.init(jax.random.key(1))
    return {"float32": params, "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}


@pytest.fixture(scope="module")
def sample():
    """`sample(params, temperature) -> batch`."""
    keys = jax.random.split(jax.random.key(2), (len(PROMPTS), 1))
    engine = rollout.Engine(tiny.MODEL, (), slots=len(PROMPTS), slot_tokens=16)

    def draw(params, temperature=1.0):
        sampler = online.sampler(engine, max_tokens=8, sampling=rollout.settings(temperature=temperature))
        return online.rows(PROMPTS, sampler(params, [data.Prompt(tokens, data.Example()) for tokens in PROMPTS], keys), max_tokens=16)

    return draw


@pytest.fixture(scope="module")
def check():
    """`check(batch, params, dtype, temperature)`: of sampled rows and the trainer's parameters."""
    look = jax.jit(
        lambda params, batch, temperature: scoring.score(tiny.MODEL, params, batch, temperature=temperature, outputs=("logps",)).logps,
        static_argnums=2,
    )

    def compare(batch, params, dtype, temperature=1.0):
        said = np.asarray(look(params, batch, temperature))
        again = np.asarray(look(params, online.moved(batch), temperature)) if dtype == "bfloat16" else None
        return online.check_agreement(batch.behavior_logps, said, batch.loss_mask, dtype=dtype, again=again)

    return compare


def adapted(params, distance=0.01):
    """Attach an adapter so far from the base: some optimiser steps."""
    frozen, start = LORA.init(jax.random.key(5), params)
    return LORA.attach(frozen, jax.tree.map(lambda x: x + distance * jax.random.normal(jax.random.key(7), x.shape, x.dtype), start))


def quantized(params):
    return NF4.attach(*NF4.init(jax.random.key(0), params))


def plain(params):
    return params


@pytest.mark.parametrize(("made", "temperature"), [(plain, 1.0), (plain, 0.7), (adapted, 1.0), (quantized, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_program_agrees_with_itself(dtype, made, temperature, weights, sample, check):
    params = made(weights[dtype])
    batch = sample(params, temperature)
    gap = check(batch, params, dtype, temperature)
    assert 0 < gap.mean <= gap.most < (1e-5 if dtype == "float32" else 0.2)
    for row in range(len(PROMPTS)):  # eight tokens that say what rounding comes to
        alone = batch.loss_mask * (np.arange(len(PROMPTS)) == row)[:, None]
        check(dataclasses.replace(batch, loss_mask=alone), params, dtype, temperature)


def off_by_one(batch):
    """The completion one position further from the prompt."""
    begun = np.cumsum(batch.loss_mask, axis=1) > 0
    return dataclasses.replace(batch, positions=batch.positions + begun.astype(np.int32))


def unseen(batch):
    """A mask that leaves out the last token but one of each prompt."""
    hidden = np.argmax(batch.loss_mask, axis=1) - 2
    segment_ids = batch.segment_ids.copy()
    segment_ids[np.arange(len(hidden)), hidden] = 9
    return dataclasses.replace(batch, segment_ids=segment_ids)


def one_late(batch):
    """Every log-probability in the next token's place."""
    return dataclasses.replace(batch, behavior_logps=np.roll(batch.behavior_logps, 1, axis=1))


FAULTS = {
    # What the sampler has, its temperature, what is made of its rows, and what the trainer has.
    "a temperature that the trainer does not know": (plain, 0.9, plain, plain),
    "an adapter that is not there": (plain, 1.0, plain, adapted),
    "an older adapter": (lambda params: adapted(params, 0.02), 1.0, plain, adapted),
    "positions": (plain, 1.0, off_by_one, plain),
    "a mask": (plain, 1.0, unseen, plain),
    "places": (plain, 1.0, one_late, plain),
    "weights in 4 bits": (quantized, 1.0, plain, plain),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_is_found_out(dtype, fault, weights, sample, check):
    samplers, temperature, spoilt, trainers = FAULTS[fault]
    batch = spoilt(sample(samplers(weights[dtype]), temperature))
    with pytest.raises(ValueError, match=f"the sampler and the trainer disagree .* rounding in {dtype} .* positions or masks"):
        check(batch, trainers(weights[dtype]), dtype)


def test_weights_of_another_dtype_are_found_out_where_they_are_more_than_rounding(weights, sample, check):
    """To a trainer that computes in float32, those of bfloat16 are others; to one in bfloat16, those of float32 round to the same."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), weights["bfloat16"])
    with pytest.raises(ValueError, match="rounding in float32"):
        check(sample(rounded), weights["float32"], "float32")
    check(sample(rounded), weights["bfloat16"], "bfloat16")


def test_what_is_not_finite_does_not_agree_and_what_was_not_sampled_does_not_matter():
    one, mask = np.zeros((1, 3)), np.array([[0.0, 1.0, 1.0]])
    assert online.disagreement(one, np.array([[9.0, 0.5, 0.0]]), mask) == (0.25, 0.5)
    with pytest.raises(ValueError, match="inf"):
        online.check_agreement(one, np.array([[0.0, np.nan, 0.0]]), mask, dtype="bfloat16")


def test_where_rounding_cannot_be_measured_the_bound_for_all_models_decides():
    """A model that does not look at positions says the same of rows that are moved, one without a last position nothing."""
    said, mask = np.zeros((1, 8)), np.ones((1, 8))
    for again in (said, said + np.nan, said + 9.0):
        online.check_agreement(said + 0.09, said, mask, dtype="bfloat16", again=again)
        with pytest.raises(ValueError, match="0.11 nats on average .* explains 0.1 and 2"):
            online.check_agreement(said + 0.11, said, mask, dtype="bfloat16", again=again)
    with pytest.raises(ValueError, match="explains 0.034 and 2"):  # 0.01 · (2 + 4 / √8)
        online.check_agreement(said + 0.035, said, mask, dtype="bfloat16", again=said + 0.01)
    online.check_agreement(said + 0.034, said, mask, dtype="bfloat16", again=said + 0.01)
