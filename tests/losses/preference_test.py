import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, scoring, sharding, train
from ftjax.losses.pairs import Pairs
from ftjax.types import Batch, Scores
from tests import toy
from tests.losses.examples import said

METHOD = peft.lora("all-linear", rank=2)
SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=4)
BETA = 0.5


def pairs(chosen, rejected):
    """Pairs of one token each: as log-ratios, against a reference that says 0."""
    chosen, rejected = (jnp.asarray(x, jnp.result_type(float)) for x in (chosen, rejected))
    one = jnp.ones_like(chosen)
    return Pairs(chosen, rejected, one, one, chosen - rejected, 0 * one, one)


def batch_of(logps, reference):
    ints = jnp.zeros(logps.shape, jnp.int32)
    return Batch(ints, jnp.ones(logps.shape), ints, ints + 1, reference_logps=reference)


def test_dpo_by_hand():
    """Log-ratios 1 + 1 = 2 and -1: Δ = 3, βΔ = 1.5, L = log(1 + e^-1.5) = 0.20141; rewards 1 and -0.5."""
    reference = jnp.full((1, 2, 2), -3.0)
    scores = Scores(reference + jnp.array([[[1.0, 1.0], [-1.0, 0.0]]]))
    loss, metrics = said(partial(losses.dpo, beta=BETA), scores, batch_of(reference, reference))
    assert loss.value() == pytest.approx(0.20141, rel=1e-4)
    assert [metrics[f"rewards/{name}"].value() for name in ("chosen", "rejected", "margin", "accuracy")] == [1.0, -0.5, 1.5, 1.0]
    assert metrics["nll"].value() == 2.0 and metrics["logps/rejected"].value() == -7.0 and metrics["kl"].value() == pytest.approx(3 / 8)


AT_EQUAL = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "robust": math.log(2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (2 * BETA) ** 2,
    "ipo_sum": 1 / (2 * BETA) ** 2,
    "exo": -math.log(2) - (math.log(1e-3) + math.log1p(-1e-3)) / 2,
    "nca": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
}


@pytest.fixture(scope="module")
def at_equal():
    """Value and gradient of each loss where both log-ratios are 0."""
    value = lambda x, loss: loss(pairs(x[:1], x[1:]), beta=BETA)[0]  # noqa: E731
    each = lambda x: {name: jax.value_and_grad(value)(x, loss) for name, loss in losses.PAIR_LOSSES.items()}  # noqa: E731
    return jax.jit(each)(jnp.zeros(2))


@pytest.mark.parametrize("name", losses.PAIR_LOSSES)
def test_the_loss_of_a_policy_that_is_its_reference_and_where_it_pulls(name, at_equal):
    """All raise Δ but DiscoPOP, which is not monotone and first lowers it; APO-down lowers both, the rejected response more."""
    value, (chosen, rejected) = at_equal[name]
    np.testing.assert_allclose(value, AT_EQUAL[name], rtol=1e-6)
    assert rejected - chosen > 0 or name == "discopop"
    assert chosen < 0 or name in ("discopop", "apo_down")


GRID = np.array([-8.0, -2.0, -0.7, 0.0, 0.7, 2.0, 8.0])
NOT_MONOTONE = {
    "ipo": "it pulls back beyond its target of 1/2β",
    "ipo_sum": "as `ipo`",
    "exo": "it pulls back beyond the label's own 1-ε",
    "nca": "a chosen response has a target too",
    "sppo_hard": "both responses have targets, ±1/2β",
    "apo_down": "the chosen response is to become less likely too",
    "discopop": "it has a dip of the width τ",
}


def in_float64(evaluate):
    """Return `{name: evaluate(loss)}` of every loss of pairs, in one program."""
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(lambda: {name: evaluate(partial(loss, beta=BETA)) for name, loss in losses.PAIR_LOSSES.items()})())


@pytest.fixture(scope="module")
def slopes():
    """The gradients of each loss in the chosen and in the rejected log-ratio over a grid of both, one pair at a time."""
    grid = np.stack([x.ravel() for x in np.meshgrid(GRID, GRID)], axis=-1)
    return in_float64(lambda loss: jax.vmap(jax.grad(lambda x: loss(pairs(x[:1], x[1:]))[0]))(jnp.asarray(grid)))


@pytest.mark.parametrize("name", losses.PAIR_LOSSES)
def test_a_loss_falls_with_the_chosen_log_ratio_and_rises_with_the_rejected(name, slopes):
    """Nowhere the other way round, but for those that turn back somewhere."""
    chosen, rejected = slopes[name].T
    assert (chosen < 0).any() and (rejected > 0).any()
    assert ((chosen <= 0).all() and (rejected >= 0).all()) == (name not in NOT_MONOTONE)


EACH_BY_ITSELF = {"nca", "bco_pair", "sppo_hard", "apo_zero", "apo_down"}
"""Losses that see more of the two log-ratios than their difference."""
ONE_SIDED = {"nca", "apo_down"}
"""Losses that treat a chosen response otherwise than the opposite of a rejected one."""


def test_the_symmetries_of_the_losses():
    """ℓ(x_c + 1, x_r + 1) = ℓ(x_c, x_r) where the margin is all; ℓ(-x_r, -x_c) = ℓ(x_c, x_r), which keeps the margin, for all but two."""
    x, y = np.random.default_rng(0).normal(size=(2, 6))
    given = [(x, y), (x + 1, y + 1), (-y, -x)]
    found = in_float64(lambda loss: [jnp.sum(loss(pairs(*each))) for each in given])
    close = {name: np.isclose(values[0], values[1:], rtol=1e-12) for name, values in found.items()}
    assert {name for name, (shifted, _) in close.items() if not shifted} == EACH_BY_ITSELF
    assert {name for name, (_, exchanged) in close.items() if not exchanged} == ONE_SIDED


def test_exchanged_labels_exchange_the_loss_of_dpo():
    """-log σ(x) + log σ(-x) = -x; smoothing by one half does not know which response was chosen."""
    x, y = jnp.array([0.3, -2.0, 5.0]), jnp.array([1.0, -0.5, -4.0])
    sigmoid = losses.PAIR_LOSSES["sigmoid"]
    np.testing.assert_allclose(sigmoid(pairs(x, y), beta=BETA) - sigmoid(pairs(y, x), beta=BETA), -BETA * (x - y), rtol=1e-5)
    smooth = partial(sigmoid, beta=BETA, label_smoothing=0.5)
    np.testing.assert_allclose(smooth(pairs(x, y)), smooth(pairs(y, x)), rtol=1e-6)


def test_aot_compares_what_has_the_same_rank():
    """Margins 3, 1 of the policy and -1, 2 of the reference: sorted (1, 3) - (-1, 2) = (2, 1), so row 0 has 3 - 2 and row 1 has 1 + 1."""
    policy, reference = jnp.array([3.0, 1.0]), jnp.array([-1.0, 2.0])
    given = pairs(jnp.zeros(2), jnp.zeros(2))._replace(policy=policy, reference=reference)
    expected = losses.PAIR_LOSSES["sigmoid"](pairs([1.0, 2.0], [0.0, 0.0]), beta=1.0)
    np.testing.assert_allclose(losses.PAIR_LOSSES["aot"](given, beta=1.0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"sigmiod": 1.0}}, "nearest: 'sigmoid'"),
        ({"losses": {"hinge": 1.0}, "label_smoothing": 0.1}, "none of hinge takes label_smoothing"),
        ({"losses": {}}, "name at least one"),
        ({"losses": {"robust": 1.0}, "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"losses": {"exo": 1.0}, "label_smoothing": 0.0}, "infinite"),
        ({"losses": {"discopop": 1.0}, "tau": 2.0}, "tau"),
        ({"beta": 0.0}, "beta is above 0"),
        ({"divergence": "reverse-kl"}, "nearest: 'reverse_kl'"),
        ({"divergence": "js", "divergence_order": 2.0}, "set divergence='alpha'"),
        ({"losses": {"sigmoid": 0.5, "aot": 0.5}, "divergence": "js"}, "'aot' compares margins .* or take 'aot_unpaired'"),
        ({"weigh": losses.LOSSES["wpo"].keywords["weigh"]}, "log_collision"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    logps = jnp.zeros((1, 2, 2))
    with pytest.raises(ValueError, match=message):
        losses.preference(Scores(logps), batch_of(logps, logps), **options)


def test_a_missing_reference_and_rows_that_are_no_pairs_are_errors():
    logps = jnp.zeros((1, 2, 2))
    with pytest.raises(ValueError, match="with_reference"):
        losses.dpo(Scores(logps), batch_of(logps, None))
    with pytest.raises(ValueError, match=r"\[b, 2, t\]"):
        losses.dpo(Scores(logps[0]), batch_of(logps[0], logps[0]))


@pytest.fixture(scope="module")
def trained():
    """Train a new adapter on random pairs, in micro-batches on four devices; return every step's metrics and what is left."""
    key, mesh = jax.random.key(0), sharding.make_mesh(data=4, devices=jax.devices()[:4])
    batch = jax.tree.map(lambda x: np.array(x).reshape(8, 2, -1), toy.batch(key, rows=16))
    batch.loss_mask[0, 1, 5:] = 0  # a shorter rejected response
    frozen, trainable = METHOD.init(key, toy.init(key))
    step = train.make_train_step(SCORE, METHOD, partial(losses.dpo, beta=BETA), optax.sgd(1.0), accumulation=2)
    state = train.init_state(key, trainable, METHOD, optax.sgd(1.0))
    reference = losses.with_reference(batch, jax.jit(SCORE)(frozen, batch))
    placed, seen = sharding.shard_batch(reference, mesh), []
    for _ in range(4):
        before = METHOD.attach(frozen, jax.tree.map(np.asarray, state.trainable))
        state, metrics = step(state, frozen, placed)
        seen.append({name: mean.value() for name, mean in metrics.items()})
    return seen, before, reference


def test_the_first_step_of_a_new_adapter_has_the_loss_log_2(trained):
    first = trained[0][0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["kl"] < 1e-9 and abs(first["rewards/margin"]) < 1e-5 and first["grad_norm"] > 0


def test_dpo_learns_to_prefer(trained):
    last = trained[0][-1]
    assert last["loss"] < math.log(2) - 0.01 and last["rewards/margin"] > 0 and last["kl"] > 0
    assert last["length/chosen"] > last["length/rejected"]


def test_micro_batches_and_devices_say_what_the_whole_batch_says(trained):
    seen, params, reference = trained
    loss, metrics = jax.jit(lambda params, batch: losses.dpo(SCORE(params, batch), batch, beta=BETA))(params, reference)
    expected = {name: mean.value() for name, mean in {"loss": loss, **metrics}.items()}
    assert {name: seen[-1][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
