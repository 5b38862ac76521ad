"""How often tokens are drawn with each setting: chi-square against expectations in NumPy's float64, which know nothing of our filters.

That the draws could tell a wrong sampler is a part of each test: they must refute each setting left out, and each number a little off, a
filter by one token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ftjax import rollout
from ftjax.rollout import Request, Seen, sample, settings
from ftjax.rollout.sampling import stack
from tests import tiny, toy

LIKELY, REFUTED = 1e-3, 1e-6
"""The least chance of draws from what was asked for, and the largest of those that refute it. Seeds are fixed."""
DRAWS = 20_000
LOGITS = np.float32(2.0) - np.float32(0.3) * np.array([3, 7, 0, 10, 5, 1, 11, 8, 2, 6, 9, 4], np.float32)
BEFORE = {"prompt": (2, 4, 1, 2), "written": (5, 4, 7, 5, 7, 7)}
ENDS = (2, 8)
CASES = (
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.82},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.4},
    {"presence_penalty": 0.5},
    {"min_tokens": 7},
    {"temperature": 2.0, "min_p": 0.38},
    {"temperature": 1.4, "top_k": 6, "top_p": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.5},
)
OFF = {"temperature": 0.05, "top_k": 1, "top_p": 0.05, "min_p": 0.05, "repetition_penalty": 0.15, "frequency_penalty": 0.15}
OFF |= {"presence_penalty": 0.2, "min_tokens": 1}

# Through the engine there are fewer draws, so what is asked for is further from doing nothing; penalties below 1 and 0 favour repetition.
SAMPLES = 1_500
PROMPT = (5, 1, 9, 2, 5)
STOP_IDS = (2, 5, 9, 10)
ENGINE_CASES = (
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.82},
    {"min_p": 0.2},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": -1.5},
    {"presence_penalty": -1.5},
    {"min_tokens": 1},
    {"temperature": 2.0, "min_p": 0.38},
    {
        "temperature": 1.4,
        "top_k": 6,
        "top_p": 0.8,
        "repetition_penalty": 0.5,
        "frequency_penalty": -1.0,
        "presence_penalty": -1.0,
        "min_tokens": 1,
    },
)
ENGINE_OFF = {**OFF, "temperature": 0.15, "frequency_penalty": 0.75, "presence_penalty": 0.75}


def name(options):
    return "+".join(options)


def sampling(options):
    return settings(**{"temperature": 1.0, **{key: value for key, value in options.items() if key != "min_tokens"}})


def others(options, off):
    """Yield each setting left out, and a setting that stands alone a little off, up and down."""
    for key, value in options.items():
        yield {other: options[other] for other in options if other != key}
        if len(options) == 1:
            yield from ({key: value - off[key]}, {key: value + off[key]})


def expected(logits, options, *, prompt, written, ends):
    """Return the probabilities `[v]` of the next token, by sorting."""
    scores = np.array(logits, np.float64)
    before, counts = sorted({*prompt, *written}), np.bincount(np.asarray(written, int), minlength=len(scores))
    factor = options.get("repetition_penalty", 1.0)
    scores[before] = np.where(scores[before] > 0, scores[before] / factor, scores[before] * factor)
    scores -= options.get("frequency_penalty", 0.0) * counts + options.get("presence_penalty", 0.0) * (counts > 0)
    if len(written) < options.get("min_tokens", 0):
        scores[list(ends)] = -np.inf
    order = np.argsort(-scores)
    shares = np.exp((scores[order] - scores.max()) / options.get("temperature", 1.0))
    shares[options.get("top_k", len(shares)) :] = 0
    shares /= shares.sum()
    shares[np.cumsum(shares) - shares >= options.get("top_p", 1.0)] = 0  # the likelier ones have the mass without it
    shares[shares < options.get("min_p", 0.0) * shares[0]] = 0
    probabilities = np.empty_like(shares)
    probabilities[order] = shares / shares.sum()
    return probabilities


def chance(counts, probabilities):
    """Return the chance that counts `[n, v]` are at least so far from what they should be by chi-square; 0 where one should be 0."""
    wanted = counts.sum(axis=1, keepdims=True) * probabilities
    if counts[wanted == 0].any():
        return 0.0
    often = wanted >= 5
    pairs = [*zip(counts[often], wanted[often], strict=True)]
    if wanted[~often].sum() >= 5:
        pairs.append((counts[~often].sum(), wanted[~often].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    return scipy.stats.chi2.sf(statistic, len(pairs) - len(counts))


@pytest.fixture(scope="module")
def drawn():
    """Counts `[v]` of each case; one call draws for all, row beside row."""
    v, cases = len(LOGITS), len(CASES)
    prompted, counts = np.isin(np.arange(v), BEFORE["prompt"]), np.bincount(BEFORE["written"], minlength=v).astype(np.int32)
    early = np.array([len(BEFORE["written"]) < options.get("min_tokens", 0) for options in CASES])
    allowed = np.repeat(~(early[:, None] & np.isin(np.arange(v), ENDS)), DRAWS, axis=0)
    rows = jax.tree.map(lambda x: np.repeat(x, DRAWS), stack([sampling(options) for options in CASES]))
    keys = jax.random.split(jax.random.key(1), cases * DRAWS)
    logits, *before = (jnp.broadcast_to(jnp.asarray(x)[None], (cases * DRAWS, v)) for x in (LOGITS, prompted, counts))
    found = jax.jit(sample)(logits, keys, rows, seen=Seen(*before), allowed=jnp.asarray(allowed))
    return [np.bincount(row, minlength=v) for row in np.asarray(found.tokens).reshape(cases, DRAWS)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: name(CASES[case]))
def test_the_sampler_draws_what_numpy_expects(case, drawn):
    def by(options):
        return chance(drawn[case][None], expected(LOGITS, options, **BEFORE, ends=ENDS)[None])

    assert by(CASES[case]) > LIKELY
    # Six tokens are written, so a minimum of 8 is as one of 7.
    assert {str(other): by(other) for other in others(CASES[case], OFF) if other != {"min_tokens": 8} and by(other) > REFUTED} == {}


@pytest.fixture(scope="module")
def engine():
    """What the engine wrote, tokens `[SAMPLES, 2]` of each case, and the trainer's logits after the prompt and after each first token."""
    params = tiny.init(jax.random.key(4))
    requests = [
        Request(
            np.array(PROMPT),
            2,
            min_tokens=options.get("min_tokens", 0),
            sampling=sampling(options),
            key=jax.random.key(n),
            num_samples=SAMPLES,
            stop_ids=STOP_IDS if "min_tokens" in options else (),
        )
        for n, options in enumerate(ENGINE_CASES)
    ]
    samples = rollout.Engine(tiny.MODEL, slots=500, slot_tokens=8, read_tokens=8, block=2).generate(params, requests)
    rows = np.array([[*PROMPT, first] for first in range(toy.VOCAB)], np.int32)
    hidden, _ = jax.jit(tiny.apply)(params, rows)
    logits = np.asarray(tiny.MODEL.unembed(tiny.MODEL.head(params), hidden))
    written = np.stack([sample.tokens for sample in samples]).reshape(len(ENGINE_CASES), SAMPLES, 2)
    return written, logits[0, -2], logits[:, -1]


@pytest.mark.parametrize("case", range(len(ENGINE_CASES)), ids=lambda case: name(ENGINE_CASES[case]))
def test_the_engine_draws_the_first_token_and_the_second_after_it_as_numpy_expects(case, engine):
    written, after_prompt, after_first = engine
    table = np.zeros((toy.VOCAB, toy.VOCAB), int)
    np.add.at(table, tuple(written[case].T), 1)
    common = np.flatnonzero(table.sum(axis=1) >= 100)

    def by(options):
        before = {"prompt": PROMPT, "ends": STOP_IDS}
        first = chance(table.sum(axis=1)[None], expected(after_prompt, options, **before, written=())[None])
        seconds = [expected(after_first[token], options, **before, written=(token,)) for token in common]
        return first, chance(table[common], np.stack(seconds))

    assert len(common) >= 4
    assert min(by(ENGINE_CASES[case])) > LIKELY
    assert {str(other): by(other) for other in others(ENGINE_CASES[case], ENGINE_OFF) if min(by(other)) > REFUTED} == {}
