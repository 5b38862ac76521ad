"""AdaLoRA's allocator beside PEFT's own numbers (third_party/peft/adalora_golden.py) and beside the paper in NumPy."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, scoring, train, tree
from ftjax.peft.adalora import Budget, Importance, budgeted, largest, scores
from tests import toy

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "peft_adalora.npz")
PEFTS = Budget(20, 4, 2, warmup_steps=3, final_steps=4, every_steps=2, beta1=0.8, beta2=0.7, orthogonality_coef=0.0)
FIELDS = {"lora_A": "a", "lora_B": "b", "lora_E": "e"}


def theirs(what, n):
    """PEFT's n-th tensors of a kind as `{"down/a": [i, r], …}`."""
    found = {}
    for name in (name for name in GOLDEN.files if name.startswith(f"{what}|")):
        module, field = name.split("|")[1].split(".")
        array = GOLDEN[name][n]
        found[f"{module}/{FIELDS[field]}"] = jnp.asarray(array.reshape(-1) if field == "lora_E" else array.T)
    return found


def test_budget_importance_and_what_is_kept_are_those_of_peft():
    """On the weights and gradients that PEFT's allocator saw. At its last ranking it takes the importance of the step before."""
    np.testing.assert_array_equal(PEFTS.triplets(2)[np.minimum(np.arange(1, 21), PEFTS.last)], GOLDEN["budget"])
    importance = {path: Importance(jnp.zeros_like(x), jnp.zeros_like(x)) for path, x in theirs("weight", 0).items()}
    ranked = list(GOLDEN["ranked"])
    for t in range(1, 21):
        weights, grads = theirs("weight", t - 1), theirs("grad", t - 1)
        if t < PEFTS.last:
            importance = {path: one.update(weights[path], grads[path], PEFTS) for path, one in importance.items()}
            for n, what in enumerate(("sensitivity", "uncertainty")):
                for path, want in theirs(what, t - 1).items():
                    np.testing.assert_allclose(importance[path][n], want, rtol=1e-5, atol=1e-9, err_msg=f"{what} {t} {path}")
        if t in ranked:
            kept = theirs("kept", ranked.index(t))
            found = {module: scores({f: importance[f"{module}/{f}"] for f in "abe"}) for module in ("down", "up")}
            got = largest(found, jnp.asarray(GOLDEN["budget"][t - 1]))
            for module in found:
                np.testing.assert_array_equal(got[module], kept[f"{module}/e"], err_msg=f"{t} {module}")
    assert ranked == [t for t in range(1, 21) if PEFTS.ranks(np.asarray(t))] == [4, 6, 8, 10, 12, 14, 16]


def paper(trained, targets, budget, rate):
    """Algorithm 1 in float64 with plain gradient descent on Σ ½ ‖A diag(e) B - M‖². Yield `{path: array}` after each step."""
    w = {path: np.asarray(x, np.float64) for path, x in trained.items()}
    smooth, unsure = {p: np.zeros_like(x) for p, x in w.items()}, {p: np.zeros_like(x) for p, x in w.items()}
    names, rank = list(targets), budget.init_rank
    kept = {}
    for t in range(1, budget.steps + 1):
        g = {}
        for name in names:
            a, b, e = (w[f"{name}/{field}"] for field in "abe")
            off = (a * e) @ b - targets[name]
            eye = np.eye(rank)
            g[f"{name}/a"] = off @ b.T * e + budget.orthogonality_coef * 4 * a @ (a.T @ a - eye)
            g[f"{name}/b"] = (off.T @ (a * e)).T + budget.orthogonality_coef * 4 * (b @ b.T - eye) @ b
            g[f"{name}/e"] = np.einsum("ir,io,ro->r", a, off, b)
        for p in w:
            now = np.abs(w[p] * g[p])
            smooth[p] = budget.beta1 * smooth[p] + (1 - budget.beta1) * now
            unsure[p] = budget.beta2 * unsure[p] + (1 - budget.beta2) * np.abs(now - smooth[p])
        w = {p: w[p] - rate * g[p] for p in w}
        last = budget.steps - budget.final_steps
        ranks = budget.warmup_steps < t <= last and (t % budget.every_steps == 0 or t == last)
        if ranks:
            s = {p: smooth[p] * unsure[p] for p in w}
            score = np.stack([s[f"{n}/e"] + s[f"{n}/a"].mean(0) + s[f"{n}/b"].mean(1) for n in names])
            left = 1 - (t - budget.warmup_steps) / (last - budget.warmup_steps)
            few, many = budget.target_rank * len(names), rank * len(names)
            count = int(few + (many - few) * left**3)
            mask = np.isin(np.arange(score.size), np.argsort(-score.ravel())[:count]).reshape(score.shape)
            kept = {name: mask[n] for n, name in enumerate(names)}
        if ranks or t > last:
            for name in names:
                w[f"{name}/e"] = np.where(kept[name], w[f"{name}/e"], 0.0)
        yield {p: x.copy() for p, x in w.items()}


def test_a_whole_schedule_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    budget = Budget(30, 4, 2, warmup_steps=4, final_steps=6, every_steps=3, beta1=0.85, beta2=0.8, orthogonality_coef=0.05)
    targets = {name: rng.standard_normal((6, 7)) * size for name, size in (("one", 1.0), ("three", 0.6), ("two", 0.3))}
    shapes = {"a": (6, 4), "b": (4, 7), "e": (4,)}
    start = {f"{name}/{f}": rng.standard_normal(shape).astype(np.float32) * 0.5 for name in targets for f, shape in shapes.items()}

    def loss(trainable):
        flat = tree.flatten(trainable["adalora"])
        products = {name: (flat[f"{name}/a"] * flat[f"{name}/e"][None]) @ flat[f"{name}/b"] for name in targets}
        return sum(jnp.sum((product - jnp.asarray(targets[name], jnp.float32)) ** 2) / 2 for name, product in products.items())

    rule = budgeted(optax.sgd(0.05), "adalora", budget)

    @jax.jit
    def step(trainable, state):
        updates, state = rule.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable = {"adalora": tree.unflatten({path: jnp.asarray(x) for path, x in start.items()})}
    state, zeros = rule.init(trainable), []
    for t, want in enumerate(paper(start, targets, budget, 0.05), 1):
        trainable, state = step(trainable, state)
        got = tree.flatten(trainable["adalora"])
        for path, x in want.items():
            np.testing.assert_allclose(got[path], x, rtol=1e-3, atol=1e-4, err_msg=f"{t} {path}")
        zeros.append(np.concatenate([got[f"{name}/e"] == 0 for name in targets]))
    zeros = np.stack(zeros)
    assert zeros[-1].sum() == 6 and (zeros[budget.last - 1 :] == zeros[-1]).all()
    at = np.array([t for t in range(1, 31) if budget.ranks(np.asarray(t))]) - 1
    assert (zeros[at[:-1]] & ~zeros[at[1:]] & ~zeros[-1]).any()  # pruned at one ranking, back at the next, and there at the end


def test_training_ends_with_the_target_budget(key):
    method = peft.adalora("all-linear", steps=8, init_rank=4, target_rank=2, final_steps=2)
    frozen, trainable = method.init(key, toy.init(key))
    step = train.make_train_step(partial(scoring.score, toy.MODEL), method, losses.sft, optax.adam(0.03))
    state, left = train.init_state(key, trainable, method, optax.adam(0.03)), []
    for _ in range(8):
        state, metrics = step(state, frozen, toy.batch(key))
        left.append(metrics["adalora_triplets"].value())
    flat = tree.flatten(state.trainable)
    assert left[-1] == sum(int(jnp.sum(x != 0)) for path, x in flat.items() if path.endswith("/e"))
    want = sum(float(np.sum((a.T @ a - np.eye(4)) ** 2)) for path, x in flat.items() for a in np.swapaxes(x, -1, -2) if path.endswith("/b"))
    want += sum(float(np.sum((a.T @ a - np.eye(4)) ** 2)) for path, x in flat.items() for a in np.asarray(x) if path.endswith("/a"))
    assert metrics["adalora_orthogonality"].value() == pytest.approx(want, rel=1e-4)
    assert left == [int(12 + 12 * max(0, 1 - t / 6) ** 3) for t in range(1, 9)] and step._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the length of the run, is needed"),
        ({"steps": 9, "target_rank": 13}, "not from 1 to init_rank 12"),
        ({"steps": 9, "warmup_steps": 5, "final_steps": 4}, "no step is left to prune"),
        ({"steps": 9, "beta1": 1.0}, "beta1 and beta2 in"),
        ({"steps": 9, "alpha": 0.0}, "expected alpha > 0"),
    ],
)
def test_what_it_has_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        peft.adalora(**options)
