"""What batches say of the weights: equal to what a plain forward and backward pass shows, and the inits that are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, quant, scoring, tree, weights
from ftjax.peft import calibration, inits
from tests import toy

UP, DOWN = "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"


def loss(params, batch):
    return -jnp.sum(scoring.score(toy.MODEL, params, batch).logps)


@pytest.fixture
def batches(key):
    return [toy.batch(k, rows=2) for k in jax.random.split(key)]


def depended_on(batch):
    """Which tokens the loss depends on, `[layer, b, t]`: in the last layer where the next one counts, below through later ones too."""
    counts = np.asarray(batch.loss_mask)[:, 1:] > 0
    before = np.flip(np.logical_or.accumulate(np.flip(counts, 1), 1), 1)
    return np.pad(np.stack([before] * (toy.LAYERS - 1) + [counts]), ((0, 0), (0, 0), (0, 1)))


def inputs(params, batch):
    """The inputs of both matrices in each layer, `{path: [layer] of [b, t, i]}`, by the toy model written out."""
    kept = {UP: [], DOWN: []}
    hidden = params["embed_tokens"]["kernel"][batch.tokens]
    time = hidden.shape[1]
    past = jnp.tril(jnp.ones((time, time))) / jnp.arange(1.0, time + 1)[:, None]
    for layer in range(toy.LAYERS):
        mixed = jnp.einsum("ts,bsd->btd", past, hidden)
        wide = jnp.tanh(mixed @ tree.flatten(params)[UP][layer])
        kept[UP].append(mixed)
        kept[DOWN].append(wide)
        hidden = hidden + wide @ tree.flatten(params)[DOWN][layer]
    return kept


def test_moments_are_those_of_the_inputs_of_tokens_that_the_loss_depends_on(batches, key):
    params = toy.init(key)
    found = calibration.input_moments(loss, params, batches)
    for path in (UP, DOWN):
        expected = 0.0
        for batch in batches:
            seen = np.asarray(jnp.stack(inputs(params, batch)[path]), np.float64) * depended_on(batch)[..., None]
            expected += np.einsum("lbti,lbtj->lij", seen, seen)
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_weights(batches, key):
    params = toy.init(key)
    found = calibration.weight_gradients(loss, params, batches, targets=["up_proj"])
    expected = sum(tree.flatten(jax.grad(loss)(params, batch))[UP] for batch in batches)
    assert set(found) == {UP}
    np.testing.assert_allclose(found[UP], expected, rtol=1e-4, atol=1e-5)


def test_a_packed_matrix_has_the_gradient_of_what_it_stands_for(batches, key):
    packed, _ = quant.nf4(["up_proj"], group=4).init(key, toy.init(key))
    found, expected = (calibration.weight_gradients(loss, params, batches[:1]) for params in (packed, weights.dense(packed)))
    for path in (UP, DOWN):
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=1e-5)


def test_eva_starts_along_the_inputs_that_vary_most(batches, key):
    params = toy.init(key)
    moments = calibration.input_moments(loss, params, batches)
    _, trainable = peft.lora(rank=3, init=inits.eva(moments)).init(key, params)
    a, b = (tree.flatten(trainable)[f"lora/{DOWN}/{side}"] for side in "ab")
    for layer in range(toy.LAYERS):
        seen = np.concatenate([np.asarray(inputs(params, x)[DOWN][layer])[depended_on(x)[layer]] for x in batches])
        projected = np.linalg.norm(seen @ np.asarray(a[layer])) ** 2
        np.testing.assert_allclose(projected, np.sum(np.linalg.svd(seen, compute_uv=False)[:3] ** 2), rtol=1e-4)  # no three hold more
        np.testing.assert_allclose(a[layer].T @ a[layer], np.eye(3), atol=1e-5)
    np.testing.assert_array_equal(b, 0.0)


@pytest.mark.parametrize("rho", [1.5, 2.0])
def test_eva_gives_its_ranks_to_the_directions_that_explain_most(rho, batches, key):
    params, rank = toy.init(key), 4
    rng, decays = np.random.default_rng(0), {UP: (0.2, 0.5, 0.9), DOWN: (0.7, 0.4, 0.3)}  # else all layers come out alike
    moments = {}
    for path, by_layer in decays.items():
        size = tree.flatten(params)[path].shape[1]
        seen = rng.standard_normal((toy.LAYERS, 40, size)) * np.power.outer(by_layer, np.arange(size))[:, None]
        moments[path] = jnp.asarray(seen.mT @ seen, jnp.float32)
    frozen, trainable = (method := peft.lora(rank=rank, init=inits.eva(moments, rho=rho))).init(key, params)
    values = {path: np.linalg.eigvalsh(np.float64(moment)) for path, moment in moments.items()}
    shares = {path: (found / found.sum(axis=1, keepdims=True))[:, ::-1][:, :rank] for path, found in values.items()}
    count = int(len(shares) * toy.LAYERS * rank / rho)
    least = np.sort(np.concatenate([share.ravel() for share in shares.values()]))[-count]
    kept = {path: np.linalg.norm(tree.flatten(trainable)[f"lora/{path}/a"], axis=1) > 0.5 for path in shares}
    for path, share in shares.items():
        np.testing.assert_array_equal(kept[path], share >= least)
    assert sum(each.sum() for each in kept.values()) == count
    assert len({row.sum() for each in kept.values() for row in each}) > 1, "all ranks came out equal: the test shows nothing"

    again = peft.lora(rank=rank, init=inits.eva(moments, rho=rho)).init
    jax.eval_shape(again, key, params)  # which leaves nothing behind that the next trace could not use
    jax.tree.map(np.testing.assert_array_equal, jax.jit(again)(key, params)[1], trainable)
    for batch in batches:
        gradients = jax.grad(lambda trainable, batch=batch: loss(method.attach(frozen, trainable), batch))(trainable)
        trainable = jax.tree.map(lambda x, dx: x - 0.1 * jnp.sign(dx), trainable, gradients)
    for path, each in kept.items():
        for side, axis in (("a", 1), ("b", 2)):
            moved = np.linalg.norm(tree.flatten(trainable)[f"lora/{path}/{side}"], axis=axis)
            np.testing.assert_array_equal(moved > 0, each)  # what has no direction stays at zero, exactly


@pytest.mark.parametrize("keep", ["task", "knowledge"])
def test_corda_trains_a_part_of_the_weight_chosen_by_its_inputs(keep, batches, key):
    params = toy.init(key)
    moments = calibration.input_moments(loss, params, batches)
    method = peft.lora(["up_proj"], rank=3, alpha=6, init=inits.corda(moments, keep=keep))
    a, b = (np.float64(tree.flatten(method.init(key, params)[1])[f"lora/{UP}/{side}"]) for side in "ab")
    moment, weight = (np.float64(x[UP]) for x in (moments, tree.flatten(params)))
    c = moment / (np.trace(moment, axis1=1, axis2=2) / toy.DIM)[:, None, None] + 0.01 * np.eye(toy.DIM)
    u, s, vt = np.linalg.svd(c @ weight, full_matrices=False)
    some = slice(3) if keep == "task" else slice(-3, None)
    expected = np.linalg.inv(c) @ np.einsum("lir,lr,lro->lio", u[..., some], s[..., some], vt[:, some])
    np.testing.assert_allclose(2 * a @ b, expected, atol=2e-3 * np.abs(expected).max())


def test_lora_ga_starts_along_the_gradient_and_changes_nothing(batches, key):
    params = toy.init(key)
    gradients = calibration.weight_gradients(loss, params, batches)
    method = peft.lora(["up_proj"], rank=2, alpha=6, init=inits.lora_ga(gradients))
    frozen, trainable = method.init(key, params)
    a, b = (np.float64(tree.flatten(trainable)[f"lora/{UP}/{side}"]) for side in "ab")
    u, s, vt = np.linalg.svd(np.float64(gradients[UP]), full_matrices=False)
    wanted = np.einsum("lir,lr,lro->lio", u[..., :2], s[..., 2:4], vt[:, 2:4]) * 16**0.25 / 4
    np.testing.assert_allclose(np.abs(a @ b), np.abs(wanted), atol=1e-3 * np.abs(wanted).max() + 1e-5)
    batch = batches[0]
    np.testing.assert_allclose(loss(method.attach(frozen, trainable), batch), loss(params, batch), rtol=1e-5)
    assert method.plan(params)[0].options["init"] == "from weight"


def test_what_was_not_calibrated_is_named(batches, key):
    moments = calibration.input_moments(loss, toy.init(key), batches, targets=["up_proj"])
    with pytest.raises(ValueError, match=rf"eva knows nothing of '{DOWN}'; nearest: '{UP}'"):
        peft.lora(["down_proj"], rank=2, init=inits.eva(moments)).init(key, toy.init(key))
    with pytest.raises(ValueError, match="no batch"):
        calibration.input_moments(loss, toy.init(key), [])
