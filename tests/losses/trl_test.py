"""Every objective that TRL has, by value and gradient: third_party/trl/golden*.py say how the numbers were made."""

import dataclasses

import numpy as np
import pytest

from tests.losses.examples import GOLDEN, HALF, NAMED, evaluate64, golden_problems, log_softmax

SHORT = {"dpo/alpha_divergence": 1e-5, "dpo/exo_pair": 1e-6, "orpo": 1e-6, "grpo/sapo": 1e-6}  # where TRL computes in float32
KNOWN = {name: example.trl for name, example in NAMED.items() if example.trl and example.trl not in ("bco", "reward/margin", "kto")}


def in_trl(found, name, golden, rtol):
    """Compare an example of `found` with a golden value and gradient."""
    mean, _, gradient = found[name]
    np.testing.assert_allclose(mean.total / mean.weight, GOLDEN[golden], rtol=rtol)
    expected, gradient = GOLDEN[f"{golden}/gradient"], gradient / mean.weight
    if golden.startswith("tpo"):  # which has the gradient in the logits, of token 0
        p = np.exp(log_softmax(GOLDEN["triple_logits"]))
        gradient = np.pad(gradient[:, :, 1:], ((0, 0), (0, 0), (0, 1)))[..., None] * ((np.arange(p.shape[-1]) == 0) - p)
    elif golden.startswith("reward"):
        gradient = gradient.sum(-1)
    else:  # TRL leaves the tokens that do not count to its model, which gives them no gradient
        expected = expected * golden_problems()[NAMED[name].form][1].loss_mask
    np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol / 100)


@pytest.fixture(scope="module")
def found():
    return evaluate64(golden_problems())


@pytest.mark.parametrize("name", KNOWN)
def test_value_and_gradient_are_those_of_trl(name, found):
    in_trl(found, name, KNOWN[name], SHORT.get(KNOWN[name], 1e-10))


def test_the_margin_and_the_centring_of_rewards_are_those_of_trl():
    in_trl(evaluate64(golden_problems(margins=GOLDEN["margins"])), "reward1", "reward/margin", 1e-10)


def test_kto_with_the_baseline_of_trl():
    """The baseline by hand; `losses.kl_baseline` is tested for itself."""
    kl = np.mean(np.sum(GOLDEN["mismatched_logps"] - GOLDEN["mismatched_reference_logps"], -1))
    assert kl > 0
    in_trl(evaluate64(golden_problems(baseline=np.full(HALF, kl))), "kto0", "kto", 1e-10)


def test_the_loss_of_steps_is_that_of_trl():
    """TRL 1.13 in float32, whose two logits have the difference v: the gradient in the second is that in v, in the first the opposite."""
    logits, labels, problems = GOLDEN["logits"][..., :2], GOLDEN["prm/labels"], golden_problems()
    scores, batch = problems["rows"]
    given = dataclasses.replace(batch, loss_mask=(labels >= 0).astype(float), labels=np.maximum(labels, 0).astype(float))
    mean, _, gradient = evaluate64(problems | {"rows": (dataclasses.replace(scores, values=logits[..., 1] - logits[..., 0]), given)})[
        "process_reward0"
    ]
    assert {0, 1} <= set(labels.ravel())
    np.testing.assert_allclose(mean.total / mean.weight, GOLDEN["prm"], rtol=1e-6)
    expected = np.stack([-gradient, gradient], axis=-1) / mean.weight
    np.testing.assert_allclose(expected, GOLDEN["prm/gradient"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["bco", "bco/weighed"])
def test_bco_with_the_running_mean_of_trl(name):
    """Two steps of TRL 1.13, whose δ has the rewards of the step itself in it, as a first pass would give it."""
    probabilities = np.insert(GOLDEN["probabilities"], [0, 2], 0.5)
    ratios = probabilities / (1 - probabilities) if name == "bco/weighed" else np.ones(HALF)
    total = weight = 0.0
    for step, scale in enumerate((1.0, 0.5)):
        for delta in (0.0, None):  # a first pass for the rewards, then the step
            problems = golden_problems(density_ratios=ratios, baseline=np.full(HALF, total / weight if delta is None else delta))
            scores, batch = problems["rows"]
            said = evaluate64(problems | {"rows": (dataclasses.replace(scores, logps=scale * scores.logps), batch)})
            if delta is not None:
                seen = said["bco0"][1]["rewards"]
                total, weight = total + seen.total, weight + seen.weight
        np.testing.assert_allclose(batch.baseline[0], GOLDEN[f"{name}/{step}/delta"], rtol=1e-6)
        in_trl(said, "bco0", f"{name}/{step}", 1e-6)
