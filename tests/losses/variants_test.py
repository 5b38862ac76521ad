"""What TRL and the papers have otherwise, and options that TRL cannot be asked for: by value and gradient against NumPy in float64."""

from functools import partial

import jax
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Scores
from tests.losses.examples import make_problem, said

BETA = 0.3


def of_pairs(per_pair):
    """Return `(log-probabilities [b, n, t], batch) -> loss`: the mean of `per_pair` over the items whose responses all have tokens."""

    def loss(logps, batch):
        lengths = batch.loss_mask.sum(-1)
        counted = (lengths > 0).all(-1)
        sums = [(x * batch.loss_mask).sum(-1)[counted] for x in (logps, batch.reference_logps)]
        return per_pair(*(x.T for x in sums), lengths[counted].T).mean()

    return loss


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def dpo_of_order(order):
    """β f'(u), f the α-divergence: f'(u) = (u^(a-1) - 1) / (a - 1)."""

    def loss(policy, reference, lengths):
        implicit = (np.exp(policy - reference) ** (order - 1) - 1) / (order - 1)
        return -log_sigmoid(BETA * (implicit[0] - implicit[1]))

    return of_pairs(loss)


CASES = {
    "α-divergence of order 2": ("dpo", {"divergence": "alpha", "divergence_order": 2.0}, dpo_of_order(2.0)),
    "α-divergence of order -0.7": ("dpo", {"divergence": "alpha", "divergence_order": -0.7}, dpo_of_order(-0.7)),
    "IPO of sums": ("ipo_sum", {}, of_pairs(lambda p, r, n: (p[0] - r[0] - p[1] + r[1] - 1 / (2 * BETA)) ** 2)),
    "RPO with the NLL of whole responses": (
        "rpo",
        {"nll_coef": 0.7, "nll_per_token": False},
        of_pairs(lambda p, r, n: -log_sigmoid(BETA * (p[0] - r[0] - p[1] + r[1])) - 0.7 * p[0]),
    ),
    "CPO with the NLL of whole responses": (
        "cpo",
        {"nll_coef": 0.7, "nll_per_token": False},
        of_pairs(lambda p, r, n: -log_sigmoid(BETA * (p[0] - p[1])) - 0.7 * p[0]),
    ),
    "TPO with the NLL of whole responses": (
        "tpo",
        {"nll_coef": 0.7, "nll_per_token": False},
        of_pairs(lambda p, r, n: -log_sigmoid(BETA * (p[0] - p[1])) - 0.7 * p[2]),
    ),
    "TPO-L with the NLL of whole responses": (
        "tpo_l",
        {"margin": 0.4, "nll_coef": 0.7, "nll_per_token": False},
        of_pairs(lambda p, r, n: -log_sigmoid(BETA * (p[0] / n[0] - p[1] / n[1]) - 0.4) - 0.7 * p[2]),
    ),
}


@pytest.fixture(scope="module")
def problems():
    return {form: make_problem(form, np.float64) for form in ("pairs", "triples")}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_formula(case, problems):
    """The formula's gradient by a complex step, which is exact to rounding."""
    name, options, formula = CASES[case]
    scores, batch = problems["triples" if name.startswith("tpo") else "pairs"]

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def evaluate(scores, batch):
        def loss(scores):
            mean, _ = losses.LOSSES[name](scores, batch, beta=BETA, **options)
            return mean.total / mean.weight

        return jax.value_and_grad(loss)(scores)

    with jax.enable_x64(True):
        value, gradient = jax.device_get(evaluate(Scores(scores.logps), batch))
    steps = np.eye(scores.logps.size).reshape(-1, *scores.logps.shape)
    expected = [formula(scores.logps + 1e-30j * step, batch).imag / 1e-30 for step in steps]
    np.testing.assert_allclose(value, formula(scores.logps, batch), rtol=1e-12)
    np.testing.assert_allclose(gradient.logps, np.reshape(expected, scores.logps.shape), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("order", "other"), [(1.0, "reverse_kl"), (0.0, "forward_kl")])
def test_the_ends_of_the_alpha_divergence_are_the_other_two(order, other):
    found = [
        said(partial(losses.dpo, beta=BETA, **options), *make_problem("pairs"))[0].value()
        for options in ({"divergence": "alpha", "divergence_order": order}, {"divergence": other})
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
