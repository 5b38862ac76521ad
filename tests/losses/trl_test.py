"""Every objective that TRL has, by value and gradient: third_party/trl/golden.py says how the numbers were made."""

import dataclasses
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Batch, Mean, Scores

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = dict(np.load(GOLDENS / "trl.npz"))
dpo = partial(losses.dpo, beta=0.3)


def pair_loss(name, **options):
    return partial(losses.preference, losses={name: 1.0}, beta=0.3, **options)


CASES = {
    "dpo/sigmoid": dpo,
    "dpo/hinge": pair_loss("hinge"),
    "dpo/ipo": pair_loss("ipo"),
    "dpo/exo_pair": pair_loss("exo", label_smoothing=0.05),
    "dpo/nca_pair": pair_loss("nca"),
    "dpo/robust": pair_loss("robust", label_smoothing=0.1),
    "dpo/bco_pair": pair_loss("bco_pair"),
    "dpo/sppo_hard": pair_loss("sppo_hard"),
    "dpo/aot": pair_loss("aot", label_smoothing=0.1),
    "dpo/aot_unpaired": pair_loss("aot_unpaired", label_smoothing=0.1),
    "dpo/apo_zero": pair_loss("apo_zero"),
    "dpo/apo_down": pair_loss("apo_down"),
    "dpo/discopop": pair_loss("discopop"),
    "dpo/sigmoid_norm": pair_loss("sigmoid_norm"),
    "dpo/forward_kl": partial(dpo, divergence="forward_kl"),
    "dpo/js_divergence": partial(dpo, divergence="js"),
    "dpo/alpha_divergence": partial(dpo, divergence="alpha"),
    "dpo/ld": partial(dpo, tail_weight=0.4),
    "dpo/wpo": partial(losses.wpo, beta=0.3),
    "dpo/mpo": partial(losses.mpo, beta=0.3),
    "orpo": partial(losses.orpo, beta=0.3),
    "cpo/sigmoid": partial(losses.cpo, beta=0.3, nll_coef=0.7),
    "cpo/hinge": partial(losses.cpo, losses={"hinge": 1.0}, beta=0.3, nll_coef=0.7),
    "cpo/ipo": partial(losses.cpo, losses={"ipo": 1.0}, beta=0.3, nll_coef=0.7),
    "cpo/smoothed": partial(losses.cpo, beta=0.3, label_smoothing=0.1, nll_coef=0.0),
    "cpo/simpo": partial(losses.simpo, beta=0.3, margin=0.5),
    "cpo/alphapo": partial(losses.simpo, beta=0.3, margin=0.5, alpha=0.25),
    "tpo/sigmoid": partial(losses.tpo, beta=0.3, nll_coef=0.7),
    "tpo/tpo-l": partial(losses.tpo_l, beta=0.3, margin=0.5, nll_coef=0.7),
    "kto": partial(losses.kto, beta=0.3, undesirable_weight=1.5),
    "kto/apo_zero_unpaired": partial(losses.apo_zero_unpaired, beta=0.3),
    "reward": lambda scores, batch: losses.bradley_terry(scores, dataclasses.replace(batch, margins=None)),
    "reward/margin": partial(losses.bradley_terry, centering_coef=0.01),
}


SHORT = {"dpo/alpha_divergence": 1e-5, "dpo/exo_pair": 1e-6, "orpo": 1e-6}  # where TRL computes in float32


def batch_of(mask, **fields):
    ints = np.zeros(mask.shape, np.int32)
    return Batch(ints, mask, ints, ints + 1, **fields)


def problem(name):
    """Return what TRL was given: the array that it differentiated, and how scores come from it, with the batch."""
    mask, reference = GOLDEN["loss_mask"], GOLDEN["reference_logps"]
    kind = name.split("/")[0]
    if kind == "reward":
        one_token = np.ones((len(mask), 2, 1))
        return GOLDEN["rewards"], lambda x: Scores(one_token, values=x[..., None]), batch_of(one_token, margins=GOLDEN["margins"])
    if kind == "tpo":
        logits = GOLDEN["triple_logits"]
        ahead = lambda x: jnp.pad(jax.nn.log_softmax(x)[..., :-1, 0], ((0, 0), (0, 0), (1, 0)))  # noqa: E731
        return logits, lambda x: Scores(ahead(x)), batch_of(mask)
    if kind == "kto":
        other = batch_of(mask[:, 2], reference_logps=GOLDEN["mismatched_reference_logps"])
        batch = batch_of(mask[:, 0], reference_logps=reference[:, 0], desirable=GOLDEN["desirable"])
        kl = losses.kl_baseline(Scores(GOLDEN["mismatched_logps"]), other)
        return GOLDEN["logps"][:, 0], Scores, losses.with_baseline(batch, kl)
    scored = partial(Scores, log_collision=GOLDEN["log_collision"][:, :2])
    return GOLDEN["logps"][:, :2], scored, batch_of(mask[:, :2], reference_logps=reference[:, :2])


@pytest.fixture(scope="module")
def found():
    """Loss, gradient and mask of every case in float64, in one program."""
    with jax.enable_x64(True):
        problems = {name: problem(name) for name in CASES}

        @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def evaluate(given):
            def mean(x, name):
                value, _ = CASES[name](problems[name][1](x), problems[name][2])
                return value.total / value.weight

            return {name: jax.value_and_grad(mean)(x, name) for name, x in given.items()}

        found = jax.device_get(evaluate({name: x for name, (x, _, _) in problems.items()}))
    return {name: (*said, problems[name][2].loss_mask) for name, said in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_trl(name, found):
    value, gradient, mask = found[name]
    rtol = SHORT.get(name, 1e-10)
    np.testing.assert_allclose(value, GOLDEN[name], rtol=rtol)
    # TRL leaves the tokens that do not count to its model, which gives them no gradient.
    expected = GOLDEN[f"{name}/gradient"] * (mask if mask.shape == gradient.shape else 1)
    np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("name", ["bco", "bco/weighed"])
def test_bco_with_the_running_mean_of_trl(name):
    """Two steps of TRL 1.13, whose δ has the rewards of the step itself in it, as a first pass would give it."""
    removed = np.load(GOLDENS / "trl_removed.npz")
    with jax.enable_x64(True):
        batch = batch_of(GOLDEN["loss_mask"][:, 0], reference_logps=GOLDEN["reference_logps"][:, 0], desirable=GOLDEN["desirable"])
        if name == "bco/weighed":
            ratios = removed["probabilities"] / (1 - removed["probabilities"])
            batch = dataclasses.replace(batch, density_ratios=np.insert(ratios, [0, 2], 7.0))
        seen = Mean(jnp.zeros(()), jnp.zeros(()))

        @jax.jit
        def step(logps, seen):
            def mean(x):
                _, metrics = losses.bco(Scores(logps), losses.with_baseline(batch, seen), beta=0.3)
                added = seen + metrics["rewards"]
                loss, metrics = losses.bco(Scores(x), losses.with_baseline(batch, added), beta=0.3)
                return loss.total / loss.weight, (added, metrics["delta"].total / metrics["delta"].weight)

            return jax.value_and_grad(mean, has_aux=True)(logps)

        for index, scale in enumerate((1.0, 0.5)):
            (value, (seen, delta)), gradient = step(scale * GOLDEN["logps"][:, 0], seen)
            np.testing.assert_allclose(delta, removed[f"{name}/{index}/delta"], rtol=1e-6)
            np.testing.assert_allclose(value, removed[f"{name}/{index}"], rtol=1e-6)
            expected = removed[f"{name}/{index}/gradient"] * batch.loss_mask
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
