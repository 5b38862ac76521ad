"""Frequencies and attention factors are those of transformers (goldens by `third_party/transformers/rope_golden.py`) and of the papers."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models
from ftjax.models import rope
from ftjax.models.config import Rope

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens" / "rope.json").read_text())
CASES = [name for name in GOLDENS if name != "made with"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_frequencies_and_factor_equal_transformers(case, field):
    golden = GOLDENS[case]
    scaling = golden["rope"] if field == "rope_parameters" else {n: v for n, v in golden["rope"].items() if n != "rope_theta"}
    raw = {"model_type": "llama", "max_position_embeddings": 32768, "rope_theta": golden["rope"]["rope_theta"], field: scaling}
    config = models.config_from_hf(raw)
    np.testing.assert_allclose(rope.frequencies(config.rope, golden["head_dim"]), golden["frequencies"], rtol=1e-6)
    np.testing.assert_allclose(rope.attention_factor(config.rope), golden["attention_factor"], rtol=1e-6)
    assert models.config_from_hf(models.to_hf(config)) == config


def test_yarn_keeps_what_turns_often_and_stretches_what_does_not():
    """By hand, c = 8, theta = 4⁴, original context 128·π: pair i turns 64 / 4^i times, so that 16 turns are pair 1 and 1 turn is pair 3."""
    bounds = {"beta_fast": 16.0, "beta_slow": 1.0, "truncate": False}
    yarn = Rope(rope_theta=256.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=128 * math.pi, **bounds)
    plain = rope.frequencies(Rope(rope_theta=256.0), 8)
    np.testing.assert_allclose(rope.frequencies(yarn, 8) / plain, [1, 1, (1 + 1 / 4) / 2, 1 / 4], rtol=1e-6)


def test_the_attention_factor_scales_cosines_and_sines():
    yarn = Rope(rope_theta=1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    cos, sin = rope.table(yarn, 8, jnp.arange(5)[None])
    np.testing.assert_allclose(jnp.sqrt(cos**2 + sin**2), 0.1 * math.log(4) + 1, rtol=1e-6)


STRETCHES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, Rope(rope_theta=1e5, rope_type="linear", factor=4.0), 32768),
    "yarn": (
        {"rope_type": "yarn", "factor": 2.5, "beta_fast": None},
        Rope(rope_theta=1e5, rope_type="yarn", factor=2.5, original_max_position_embeddings=8192),
        20480,
    ),
    "from an earlier context": (
        {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 2048},
        Rope(rope_theta=1e5, rope_type="linear", factor=4.0),
        8192,
    ),
}


@pytest.mark.parametrize("case", STRETCHES)
def test_a_context_is_stretched(case):
    options, expected, positions = STRETCHES[case]
    found = models.stretch(models.preset("smollm2-135m"), options)
    assert (found.rope, found.max_position_embeddings) == (expected, positions)


def test_only_the_full_layers_of_a_family_with_two_ropes_are_stretched():
    gemma = models.preset("gemma-3-1b")
    found = models.stretch(gemma, {"rope_type": "linear", "factor": 2.0})
    assert found.rope.factor == 2.0 and found.local_rope == gemma.local_rope


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama-3.1-8b", {"rope_type": "yarn", "factor": 4.0}, "stretched already .*'llama3'.* say original_max_position_embeddings"),
        ("smollm2-135m", {"rope_type": "yarn"}, "rope_type 'yarn' needs factor"),
        ("smollm2-135m", {"rope_type": "linear", "factor": 0.5}, "must be at least 1, not 0.5"),
        ("smollm2-135m", {"rope_type": "linear", "factor": "4"}, "must be positive numbers, not '4'"),
        ("smollm2-135m", {"rope_type": "dynamic", "factor": 4.0}, "'dynamic' is not supported: its frequencies change with the length"),
        ("smollm2-135m", {"rope_type": "liner", "factor": 4.0}, "rope_type 'liner' is not supported; one of default, linear"),
    ],
)
def test_a_stretch_that_cannot_be_meant_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.stretch(models.preset(name), options)


def test_a_replaced_stretch_says_what_it_replaces():
    options = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    found = models.stretch(models.preset("llama-3.1-8b"), options)
    assert (found.rope.rope_type, found.max_position_embeddings, found.rope.low_freq_factor) == ("yarn", 32768, 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_forms_of_a_rotation_are_the_equation_with_its_gradient(dtype, key):
    x, dy = (jax.random.normal(k, (2, 5, 3, 8), dtype) for k in jax.random.split(key))
    angles = np.linspace(-3.0, 40.0, 2 * 5 * 4).reshape(2, 5, 4)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turn = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64))[:, :, None]
    x_pairs, dy_pairs = (y[..., :4] + 1j * y[..., 4:] for y in (np.asarray(x, np.float64), np.asarray(dy, np.float64)))
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    for form in (rope.rotate, rope._by_halves, rope._by_reversing):
        found, pull = jax.vjp(lambda x, form=form: form(x, cos, sin), x)
        assert found.dtype == dtype
        for one, expected in ((found, x_pairs * turn), (pull(dy)[0], dy_pairs * turn.conj())):
            expected = np.concatenate([expected.real, expected.imag], axis=-1)
            np.testing.assert_allclose(np.asarray(one, np.float64), expected, rtol=tolerance, atol=tolerance)
