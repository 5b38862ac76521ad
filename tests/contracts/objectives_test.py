"""Every objective through the one training step, with adapters, in full, and over packed weights: a new one joins by being listed.

For each method there is one program, in which a number chooses the objective, so that the whole matrix costs few compilations. Its six rows
are six responses, three pairs or two triples. The anchor is the reference and a little beside it: where policy and anchor are equal, many
objectives have one value for all models.
"""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, quant, scoring, train, tree, weights
from ftjax.losses import distillation
from ftjax.types import TEACHER, VALUE_HEAD, Scores
from tests import toy

ROWS, RANK, ALPHA = 6, 2, 3.0
TOGETHER = {"pairs": 2, "triples": 3}
PACKED, LOW_RANK = quant.nf4(group=4), {"rank": RANK, "alpha": ALPHA}
ADAPTERS = {
    "lora": peft.lora(**LOW_RANK),
    "dora": peft.dora(**LOW_RANK),
    "nf4+lora": peft.chain(PACKED, peft.lora(**LOW_RANK)),
}
FULL = peft.anchored(peft.full("everything", exclude=f"{VALUE_HEAD}/.*"))
METHODS = {name: peft.chain(method, peft.value_head()) for name, method in {**ADAPTERS, "full": FULL}.items()}
OUTPUTS = {output for needs in losses.NEEDS.values() for output in needs.outputs} - {"divergence"}
LOOK = partial(scoring.score, toy.MODEL, outputs=("logps",))
SCORE = partial(scoring.score_against, toy.MODEL, toy.MODEL, divergence=distillation.forward_kl, outputs=tuple(sorted(OUTPUTS)))
OPTIMIZER = optax.sgd(0.5, momentum=0.9)  # its memory after one step is the gradient

every_loss = pytest.mark.parametrize("name", losses.LOSSES)


class Outcome(NamedTuple):
    """Of one step, on the host."""

    loss: float
    grad_norm: float
    gradient: Any
    start: Any
    trained: Any
    frozen_before: Any
    frozen: Any


def complete(frozen, batch):
    """Write what the anchor says; to rollouts it is also what the policy said when they were sampled."""
    said = LOOK(peft.reference(frozen), batch).logps
    said = said + 0.1 * (jnp.sin(jnp.arange(said.size)).reshape(said.shape) - 0.5) * batch.loss_mask
    return dataclasses.replace(losses.with_reference(batch, Scores(said)), old_logps=said)


def measure(params, frozen, batch):
    """Return the baseline of KTO, which BCO gets too, for the mean of what it saw before."""
    rows = complete(frozen, batch.mismatched)
    return losses.kl_baseline(LOOK(params, rows), rows)


def said_by(name, scores, batch):
    """Return the mean of one objective, for which rows belong together as its data do."""
    together = TOGETHER.get(losses.NEEDS[name].data)

    def shaped(x):
        return x if together is None else x[: ROWS // together] if x.ndim == 1 else x.reshape(-1, together, x.shape[-1])

    return losses.LOSSES[name](*jax.tree.map(shaped, (scores, dataclasses.replace(batch, mismatched=None))))[0]


@cache
def step_of(method):
    """Return `step(state, frozen, batch, number)`, with the number of an objective in `losses.LOSSES`."""

    def step(state, frozen, batch, number):
        def loss_fn(scores, batch):
            means = [said_by(name, scores, batch) for name in losses.LOSSES]
            return jax.tree.map(lambda *each: jnp.sum(jnp.where(jnp.arange(len(each)) == number, jnp.stack(each), 0)), *means), {}

        baseline = train.Baseline(measure, losses.with_baseline)
        train_step = train.make_train_step(SCORE, METHODS[method], loss_fn, OPTIMIZER, complete=complete, baseline=baseline)
        return train_step(state, frozen, batch)

    return jax.jit(step, donate_argnums=0)


def batch_of(key):
    rows, others = (toy.batch(jax.random.fold_in(key, n), rows=ROWS) for n in range(2))
    return dataclasses.replace(
        rows,
        loss_mask=rows.loss_mask.at[1, 6:].set(0),
        mismatched=others,
        desirable=(jnp.arange(ROWS) % 3 > 0).astype(jnp.float32),
        advantages=jnp.cos(jnp.arange(ROWS)),
        returns=jnp.cos(rows.tokens),
        labels=(rows.tokens % 2).astype(jnp.float32),
    )


def base(key, packed):
    """Return the parameters, and with `packed` the dense ones that NF4 makes of them."""
    params = toy.init(key) | {VALUE_HEAD: {"kernel": jax.random.normal(key, (toy.DIM, 1)), "bias": jnp.ones(1)}}
    return weights.dense(PACKED.init(key, params)[0]) if packed else params


@cache
def outcomes(method, packed=False):
    """Return what a step from the base makes of a method, by the objective."""
    key, found = jax.random.key(0), {}
    frozen, trainable = METHODS[method].init(key, base(key, packed))
    frozen = {**frozen, TEACHER: toy.init(jax.random.key(1))}
    start, before, batch = *jax.device_get((trainable, frozen)), batch_of(key)
    for number, name in enumerate(losses.LOSSES):
        state, metrics = step_of(method)(train.init_state(key, trainable, METHODS[method], OPTIMIZER), frozen, batch, number)
        gradient, trained, after = jax.device_get((state.opt_state[0].trace, state.trainable, frozen))
        found[name] = Outcome(metrics["loss"].value(), metrics["grad_norm"].value(), gradient, start, trained, before, after)
        trainable = jax.tree.map(jnp.array, start)  # anew, for the step took it
    return found


def by_the_chain_rule(method, start, full):
    """Return the gradient of an adapter from G, that of the matrices W themselves.

    W + s A B with B = 0: s Aᵀ G for B and 0 for A. In DoRA m ⊙ W / ‖W‖ stands for W, the norm a constant: Σ_i G W / ‖W‖ for m.
    """
    found = {path: leaf for path, leaf in tree.flatten(full.gradient).items() if path.startswith(VALUE_HEAD)}
    slopes, matrices = (tree.flatten(x["full"]) for x in (full.gradient, full.start))
    for path, leaf in tree.flatten({name: part for name, part in start.items() if name != VALUE_HEAD}).items():
        home, _, part = path.partition("/")[2].rpartition("/")
        slope, matrix = (x[home].astype(np.float64) for x in (slopes, matrices))
        if part == "a":
            found[path] = np.zeros(leaf.shape)
        elif part == "b":
            found[path] = ALPHA / RANK * np.einsum("lir,lio->lro", tree.flatten(start)[f"{path[:-1]}a"], slope)
        else:
            found[path] = np.sum(slope * matrix, axis=-2) / np.linalg.norm(matrix, axis=-2)
    return found


@every_loss
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_new_adapter_has_the_loss_of_its_base_and_the_gradient_of_the_chain_rule(method, name):
    got, full = outcomes(method)[name], outcomes("full", packed="nf4" in method)[name]
    assert got.loss == pytest.approx(full.loss, rel=1e-5)
    expected = by_the_chain_rule(method, got.start, full)
    assert expected.keys() == tree.flatten(got.gradient).keys()
    for path, leaf in tree.flatten(got.gradient).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-5 * np.abs(expected[path]).max(), err_msg=path)


@every_loss
@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_all_that_is_trainable_and_leaves_the_frozen_tree(method, name):
    found = outcomes(method)[name]
    assert np.isfinite(found.loss) and np.isfinite(found.grad_norm) and found.grad_norm > 0
    start, trained = tree.flatten(found.start), tree.flatten(found.trained)
    still = {path for path, leaf in trained.items() if np.array_equal(leaf, start[path])}
    idle = {path for path in start if path.endswith("kernel/a")}  # until B is no longer 0
    if "values" not in losses.NEEDS[name].outputs:
        idle |= {f"{VALUE_HEAD}/kernel"}
    assert still - {f"{VALUE_HEAD}/bias"} == idle  # a bias is the same in both responses of a pair
    chex.assert_trees_all_equal(found.frozen, found.frozen_before)
