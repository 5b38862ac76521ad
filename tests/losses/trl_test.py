"""Every objective that TRL has, by value and gradient: third_party/trl/golden.py says how the numbers were made."""

import dataclasses
import pathlib
from functools import partial

import jax
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Batch, Scores

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "goldens" / "trl.npz"))
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
}


SHORT = {"dpo/alpha_divergence": 1e-5, "dpo/exo_pair": 1e-6}  # where TRL computes in float32


def problem(form):
    """Return what TRL was given; of the responses, chosen and rejected for pairs and the first for rows."""
    select = {"pairs": np.s_[:, :2], "rows": np.s_[:, 0]}[form]
    mask = GOLDEN["loss_mask"][select]
    ints = np.zeros(mask.shape, np.int32)
    scores = Scores(GOLDEN["logps"][select], log_collision=GOLDEN["log_collision"][select])
    return scores, Batch(ints, mask, ints, ints + 1, reference_logps=GOLDEN["reference_logps"][select])


@pytest.fixture(scope="module")
def found():
    """Loss and gradient of every case in float64, in one program."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def evaluate(problems):
        def mean(loss, logps):
            scores, batch = problems["pairs"]
            value, _ = loss(dataclasses.replace(scores, logps=logps), batch)
            return value.total / value.weight

        return {name: jax.value_and_grad(partial(mean, loss))(problems["pairs"][0].logps) for name, loss in CASES.items()}

    with jax.enable_x64(True):
        return jax.device_get(evaluate({"pairs": problem("pairs")}))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_trl(name, found):
    rtol = SHORT.get(name, 1e-10)
    np.testing.assert_allclose(found[name][0], GOLDEN[name], rtol=rtol)
    gradient = GOLDEN[f"{name}/gradient"] * problem("pairs")[1].loss_mask  # TRL leaves the masked tokens to its model
    np.testing.assert_allclose(found[name][1], gradient, rtol=rtol, atol=rtol / 100)
