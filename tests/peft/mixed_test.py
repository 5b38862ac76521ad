"""Adapters mixed in one batch: every row as if it were alone, in value and gradient, for one product with the base."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, quant, scoring, weights
from tests import toy
from tests.contracts.methods_test import EXAMPLES, VECTORS, moved

APART = {"full", "bitfit", "norm_tuning", "parallel_bottleneck", "value_head", "loftq", *peft.SOFT_PROMPTS}
"""They change the model's own leaves, or add to its layers."""
RIDING = {name: makes[-1]() for name, makes in EXAMPLES.items() if name not in APART}
ROWS = ["b", None, "a", "b", None]


def base(key):
    params = toy.init(key)
    params["layers"]["mlp"]["down_proj"]["bias"] = jnp.full((toy.LAYERS, toy.DIM), 0.1)
    return params


@jax.jit
def logits(params, batch):
    hidden, _ = toy.apply(params, batch.tokens, segment_ids=batch.segment_ids)
    return toy.unembed(toy.head(params), hidden)


def logps(params, batch):
    return scoring.score(toy.MODEL, params, batch).logps


def trained(method, params, key, names="ab"):
    """Return `(attach, {name: trainable})` of adapters away from their start."""
    frozen, start = method.init(key, params)
    return partial(method.attach, frozen), {name: moved(start, jax.random.fold_in(key, n)) for n, name in enumerate(names)}


def adapters(*arguments):
    attach, trees = trained(*arguments)
    return {name: attach(tree) for name, tree in trees.items()}


def check_rows(params, attach, trees, rows, batch):
    """Every row of the mixed batch is that of a batch in which all rows have its adapter, and adapters differ.

    `attach` is that of each tree, all of it inside `jit`.
    """
    together = jax.jit(lambda trees: logits(peft.mixed(params, {name: attach[name](tree) for name, tree in trees.items()}, rows), batch))
    alone = {id(one): jax.jit(lambda tree, one=one: logits(one(tree), batch)) for one in attach.values()}
    want = {None: logits(params, batch)} | {name: alone[id(attach[name])](tree) for name, tree in trees.items()}
    got = together(trees)
    for n, name in enumerate(rows):
        # Some adapters make large logits, whose rounding is that of the largest term and not of the sum.
        np.testing.assert_allclose(got[n], want[name][n], rtol=0, atol=2e-6 * np.abs(want[name][n]).max())
        assert name is None or np.abs(want[name][n] - want[None][n]).max() > 1e-3


@pytest.mark.parametrize("name", RIDING)
def test_each_row_is_computed_as_if_its_adapter_were_alone(name, key):
    params = base(key)
    attach, trees = trained(RIDING[name], params, key)
    check_rows(params, dict.fromkeys(trees, attach), trees, ROWS, toy.batch(key, rows=len(ROWS)))


def test_methods_ranks_targets_and_chains_share_a_batch(key):
    params = base(key)
    methods = {
        "small": peft.lora(["up_proj"], rank=1, alpha=3),
        "large": peft.lora("everything", exclude=VECTORS, rank=4, rslora=True),
        "pissa": peft.lora(["down_proj"], rank=2, init="pissa"),
        "dora": peft.dora(["up_proj"], rank=2),
        "two": peft.chain(peft.lora(["up_proj"], rank=2), peft.lora("all-linear", rank=3, name="second")),
    }
    made = {name: trained(method, params, jax.random.fold_in(key, n), "a") for n, (name, method) in enumerate(methods.items())}
    attach, trees = {name: attach for name, (attach, _) in made.items()}, {name: trees["a"] for name, (_, trees) in made.items()}
    check_rows(params, attach, trees, [*methods, None], toy.batch(key, rows=len(methods) + 1))


def test_an_adapter_gets_its_gradient_from_its_own_rows_alone(key):
    params, batch = base(key), toy.batch(key, rows=len(ROWS))
    attach, trees = trained(peft.lora("everything", exclude=VECTORS, rank=2), params, key)

    @jax.jit
    @jax.grad
    def together(trees):
        return jnp.sum(logps(peft.mixed(params, {name: attach(tree) for name, tree in trees.items()}, ROWS), batch))

    @jax.jit
    @jax.grad
    def alone(tree, own):
        return jnp.sum(logps(attach(tree), batch) * own[:, None])

    grads = together(trees)
    for name, tree in trees.items():
        own = jnp.array([float(row == name) for row in ROWS])
        chex.assert_trees_all_close(grads[name], alone(tree, own), rtol=1e-4, atol=1e-5)


def test_the_base_is_multiplied_by_once_for_all_rows(key):
    params, x = {"q_proj": {"kernel": jnp.ones((64, 128))}}, jnp.ones((6, 5, 64))
    named = adapters(peft.lora(["q_proj"], rank=2), params, key)
    both = peft.mixed(params, named, ["a", "b", "a", None, "b", "a"])["q_proj"]["kernel"]
    flops = [jax.jit(weights.dot).lower(x, w).compile().cost_analysis()["flops"] for w in (params["q_proj"]["kernel"], both)]
    thin = 2 * 30 * 2 * (64 + 128)
    assert flops[0] == 2 * 30 * 64 * 128 and flops[0] + thin <= flops[1] < flops[0] + 2 * thin


def test_a_quantised_base_stays_packed_and_gives_the_same_rows(key):
    method = peft.chain(quant.nf4(["q_proj"]), peft.lora(["q_proj"], rank=2))
    frozen, _ = method.init(key, {"q_proj": {"kernel": jax.random.normal(key, (64, 8))}})
    trees = {name: moved(method.init(key, {"q_proj": {"kernel": jnp.ones((64, 8))}})[1], jax.random.key(n)) for n, name in enumerate("ab")}
    named = {name: method.attach(frozen, tree) for name, tree in trees.items()}
    x, rows = jax.random.normal(key, (3, 2, 64)), ["b", None, "a"]
    both = peft.mixed(frozen, named, rows)["q_proj"]["kernel"]
    assert both.base is frozen["q_proj"]["kernel"]
    for n, (name, got) in enumerate(zip(rows, weights.dot(x, both), strict=True)):
        alone = frozen if name is None else named[name]
        np.testing.assert_allclose(got, weights.dot(x[n], alone["q_proj"]["kernel"]), rtol=1e-5, atol=1e-5)


def test_what_two_adapters_share_with_all_their_leaves_they_share_with_each_other(key):
    """Two VeRA files bring equal projections; were they of two kinds, every row would be projected twice."""
    params = base(key)
    method = peft.vera(["up_proj"], rank=4)
    apart = {name: method.attach(*method.init(jax.random.key(n), params)) for n, name in enumerate("ab")}
    other = peft.vera(["up_proj"], rank=4, seed=1)
    stacked = peft.stack_adapters(params, apart | {"c": other.attach(*other.init(key, params))})
    assert len(stacked["layers"]["mlp"]["up_proj"]["kernel"].kinds) == 2


def test_another_adapter_and_other_rows_compile_nothing(key):
    params, batch = base(key), toy.batch(key, rows=3)
    large, small = (adapters(peft.lora("all-linear", rank=rank), params, key, names) for rank, names in ((4, "ab"), (1, "cd")))

    def apply(params):
        return toy.apply(params, batch.tokens, segment_ids=batch.segment_ids)[0]

    compute, alone = jax.jit(chex.assert_max_traces(apply, n=1)), jax.jit(apply)
    for named, rows in ((large, [0, 1, -1]), (large, [1, 1, 0]), (small, [-1, 0, 1])):
        got = compute(peft.assign_rows(peft.stack_adapters(params, named, rank=4), rows))
        for n, row in enumerate(rows):
            np.testing.assert_allclose(got[n], alone([*named.values(), params][row])[n], atol=1e-5)


def wrong(params, key):
    lora = peft.lora(["up_proj"], rank=1, dropout=0.5)
    frozen, trainable = lora.init(key, params)
    full = peft.full(["up_proj"])
    other = jax.tree.map(jnp.copy, params)
    return {
        "unknown": (lambda: peft.mixed(params, {"alpha": params}, ["alhpa"]), "no adapter 'alhpa'; nearest: 'alpha'"),
        "whole": (
            lambda: peft.mixed(params, {"a": full.attach(*full.init(key, params))}, ["a"]),
            "'a' at 'layers/mlp/up_proj/kernel' is no",
        ),
        "other base": (lambda: peft.mixed(other, {"a": lora.attach(frozen, trainable)}, ["a"]), "for other parameters"),
        "more": (lambda: peft.mixed(params, {"a": {**params, "slots": {"x": jnp.ones(1)}}}, ["a"]), "has or lacks 'slots/x'"),
        "key": (lambda: peft.mixed(params, {"a": lora.attach(frozen, trainable, key=key)}, ["a"]), "holds a key"),
        "rows": (lambda: logps(peft.mixed(params, {"a": lora.attach(frozen, trainable)}, ["a"]), toy.batch(key)), "assigned to 1 rows"),
        "none": (lambda: logps(peft.stack_adapters(params, {"a": lora.attach(frozen, trainable)}), toy.batch(key)), "assign_rows"),
        "dense": (lambda: weights.dense(peft.mixed(params, {"a": lora.attach(frozen, trainable)}, ["a"])), "no dense one"),
    }


@pytest.mark.parametrize("case", ["unknown", "whole", "other base", "more", "key", "rows", "none", "dense"])
def test_what_cannot_be_mixed_says_why(case, key):
    make, message = wrong(base(key), key)[case]
    with pytest.raises(ValueError, match=message):
        make()
