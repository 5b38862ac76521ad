import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, scoring
from ftjax.losses import distillation
from ftjax.types import TEACHER, Batch, Scores
from tests import toy
from tests.losses.examples import GOLDEN

CASES = {
    "jsd/0.0": distillation.forward_kl,
    "jsd/0.1": partial(distillation.jsd, beta=0.1),
    "jsd/0.5": distillation.jsd,
    "jsd/1.0": distillation.reverse_kl,
    "jsd/warm": partial(distillation.jsd, temperature=0.9),
    "uld": distillation.uld,
}


@pytest.fixture(scope="module")
def found():
    """Loss and gradient of every divergence on the logits that TRL was given, in float64, and what the stored form says."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def evaluate(logits, teacher, other, mask):
        def mean(logits, name):
            uld = name == "uld"
            weights = jnp.ones_like(mask) if uld else mask
            return jnp.sum(CASES[name](logits, other if uld else teacher) * weights) / jnp.sum(weights)

        found = {name: jax.value_and_grad(mean)(logits, name) for name in CASES}
        said, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), teacher.shape[-1])
        found["kl"] = distillation.forward_kl(logits, teacher)
        found["stored"] = {k: distillation.stored_kl(logits, ids[..., :k], said[..., :k]) for k in (1, 4, teacher.shape[-1])}
        found["self"] = distillation.stored_kl(teacher, ids[..., :4], said[..., :4])
        return found

    with jax.enable_x64(True):
        given = [GOLDEN[name] for name in ("logits", "teacher_logits", "other_logits")]
        return jax.device_get(evaluate(*given, GOLDEN["loss_mask"][:, 0]))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_trl(name, found):
    np.testing.assert_allclose(found[name][0], GOLDEN[name], rtol=1e-6)
    np.testing.assert_allclose(found[name][1], GOLDEN[f"{name}/gradient"], rtol=1e-6, atol=1e-9)


def test_stored_log_probabilities_bound_the_divergence_from_below(found):
    bounds = [*found["stored"].values(), found["kl"]]
    assert all((low <= high + 1e-9).all() for low, high in zip(bounds, bounds[1:], strict=False))
    np.testing.assert_allclose(found["stored"][11], found["kl"], rtol=1e-4)
    np.testing.assert_allclose(found["self"], 0, atol=1e-12)


def test_the_ends_of_the_jensen_shannon_divergence_are_other_functions():
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="forward_kl and reverse_kl"):
            distillation.jsd(jnp.zeros(3), jnp.zeros(3), beta=beta)


def test_a_missing_divergence_and_a_missing_teacher_are_errors():
    batch = toy.batch(jax.random.key(0))
    with pytest.raises(ValueError, match="score_against"):
        losses.distill(Scores(batch.loss_mask), batch)
    with pytest.raises(ValueError, match="teacher"):
        scoring.score_against(toy.MODEL, None, toy.init(jax.random.key(0)), batch, divergence=distillation.stored_kl)


def whole_logits(params, batch):
    hidden, _ = toy.apply(params, batch.tokens, segment_ids=batch.segment_ids)
    return toy.unembed(toy.head(params), hidden)[:, :-1]


@pytest.fixture(scope="module")
def models():
    student, teacher = (toy.init(jax.random.key(n)) for n in range(2))
    batch = toy.batch(jax.random.key(2), packed=True)
    later = Batch(*(jnp.pad(x, ((0, 0), (2, 0))) for x in jax.tree.leaves(batch)))  # the same text after two tokens of padding
    with_said = partial(dataclasses.replace, batch)
    said, ids = jax.lax.top_k(jax.nn.log_softmax(whole_logits(teacher, batch)), 3)
    stored = with_said(teacher_ids=jnp.pad(ids, ((0, 0), (1, 0), (0, 0))), teacher_logps=jnp.pad(said, ((0, 0), (1, 0), (0, 0))))
    return student, teacher, {"teacher": batch, "other tokens": with_said(teacher=later), "stored": stored}


def test_chunks_say_what_the_whole_logits_say(models):
    """Divergence, its gradient and agreement: of a teacher in the same program, with its own tokens, and of a stored one."""
    student, teacher, batches = models

    @jax.jit
    def chunked(student, teacher, batches):
        def total(params, name):
            given = {"divergence": distillation.stored_kl} if name == "stored" else {"divergence": distillation.jsd}
            other, branch = (None, {}) if name == "stored" else (toy.MODEL, {TEACHER: teacher})
            batch = batches[name]
            given["outputs"] = ("logps", "agreement")
            scores = scoring.score_against(toy.MODEL, other, {**params, **branch}, batch, chunk_tokens=4, **given)
            return losses.distill(scores, batch)[0].total, (scores.divergence, scores.agreement)

        return {name: jax.value_and_grad(total, has_aux=True)(student, name) for name in batches}

    @jax.jit
    def whole(student, teacher, batches):
        mask = batches["teacher"].loss_mask[:, 1:]

        def total(params, stored):
            logits = whole_logits(params, batches["teacher"])
            if stored:
                values = distillation.stored_kl(logits, batches["stored"].teacher_ids[:, 1:], batches["stored"].teacher_logps[:, 1:])
            else:
                values = distillation.jsd(logits, whole_logits(teacher, batches["teacher"]))
            agree = (jnp.argmax(logits, -1) == jnp.argmax(whole_logits(teacher, batches["teacher"]), -1)).astype(jnp.float32)
            return jnp.sum(values * mask), tuple(jnp.pad(x * mask, ((0, 0), (1, 0))) for x in (values, agree))

        return {stored: jax.value_and_grad(total, has_aux=True)(student, stored) for stored in (False, True)}

    got, expected = jax.device_get((chunked(student, teacher, batches), whole(student, teacher, batches)))
    for name in batches:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got[name], expected[name == "stored"])


def test_the_likeliest_tokens_of_a_teacher_are_found_in_chunks(models):
    _, teacher, batches = models
    batch, stored = batches["teacher"], batches["stored"]
    ids, logps = jax.jit(lambda params: scoring.likeliest(toy.MODEL, params, batch, count=3, chunk_tokens=4))(teacher)
    counted = np.asarray(batch.loss_mask) > 0
    assert np.array_equal(np.asarray(ids)[counted], np.asarray(stored.teacher_ids)[counted]) and not np.any(np.asarray(ids)[~counted])
    np.testing.assert_allclose(np.asarray(logps)[counted], np.asarray(stored.teacher_logps)[counted], rtol=1e-5, atol=1e-6)


def test_a_method_leaves_the_teacher_alone(models):
    student, teacher, _ = models
    method = peft.lora("all-linear", rank=2)
    frozen, trainable = method.init(jax.random.key(0), student)
    params = method.attach({**frozen, TEACHER: teacher}, trainable)
    assert params[TEACHER]["norm"]["scale"] is teacher["norm"]["scale"] and "scale" in params["norm"]


def one_hot(at, far):
    return np.where(np.arange(5) == at, 0.0, far)


EXTREMES = {
    "±1e4": (1e4 * np.array([1.0, -1, 1, -1, 0]), 1e4 * np.array([-1.0, 1, 0, 1, -1])),
    "certain and right": (one_hot(1, -1e4), one_hot(1, -1e4)),
    "certain and wrong": (one_hot(1, -1e4), one_hot(2, -1e4)),
    "a certain teacher": (np.linspace(-1, 1, 5), one_hot(2, -1e4)),
    "a certain student": (one_hot(2, -1e4), np.linspace(-1, 1, 5)),
}
RULED_OUT = {
    "all but one": (np.linspace(-1, 1, 5), one_hot(2, -np.inf)),
    "one": (np.linspace(-1, 1, 5), np.array([0.3, -np.inf, 0.1, 1.0, -1.0])),
    "the same in both": (np.array([0.2, -np.inf, 0.1, 1.0, -1.0]), np.array([0.3, -np.inf, 0.7, 1.0, -2.0])),
}


def stored(student, teacher, *, count=3):
    """The divergence from what a file has of a teacher."""
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), count)
    return distillation.stored_kl(student, ids, logps)


DIVERGENCES = {**distillation.DIVERGENCES, "stored": stored}


@pytest.fixture(scope="module")
def at_the_ends():
    """Value and gradient of every divergence at extreme logits, in float32."""
    cases = {name: tuple(np.float32(x) for x in pair) for name, pair in (EXTREMES | RULED_OUT).items()}

    @jax.jit
    def evaluate(cases):
        return {(name, case): jax.value_and_grad(DIVERGENCES[name])(*cases[case]) for name in DIVERGENCES for case in cases}

    return jax.device_get(evaluate(cases))


def log_softmax64(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def kl64(log_p, log_q):
    """Σ p (log p - log q) over what p does not rule out."""
    some = np.exp(log_p) > 0
    return (np.exp(log_p[some]) * (log_p[some] - log_q[some])).sum()


def slope64(log_p, log_q, *, of_p):
    """Of KL(p ‖ q) in the logits of p or of q: p (log p - log q - KL), or q - p."""
    if not of_p:
        return np.exp(log_q) - np.exp(log_p)
    some = np.exp(log_p) > 0
    return np.where(some, np.exp(log_p) * (np.where(some, log_p, 0) - np.where(some, log_q, 0) - kl64(log_p, log_q)), 0)


@pytest.mark.parametrize("case", [*EXTREMES, *RULED_OUT])
def test_extreme_logits_have_the_divergences_and_gradients_of_float64(case, at_the_ends):
    student, teacher = (log_softmax64(x) for x in (EXTREMES | RULED_OUT)[case])
    with np.errstate(divide="ignore"):
        mixture = np.log((np.exp(student) + np.exp(teacher)) / 2)
    expected = {
        "forward_kl": (kl64(teacher, student), slope64(teacher, student, of_p=False)),
        "jsd": ((kl64(teacher, mixture) + kl64(student, mixture)) / 2, slope64(student, mixture, of_p=True) / 2),
    }
    if case in EXTREMES or case == "the same in both":
        expected["reverse_kl"] = kl64(student, teacher), slope64(student, teacher, of_p=True)
    else:
        assert at_the_ends["reverse_kl", case][0] == np.inf
    for name, (value, slope) in expected.items():
        np.testing.assert_allclose(at_the_ends[name, case][0], value, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(at_the_ends[name, case][1], slope, rtol=1e-5, atol=1e-6, err_msg=name)
    for name in ("uld", "stored"):
        assert all(np.isfinite(x).all() for x in at_the_ends[name, case])


def test_the_gradient_of_stored_log_probabilities_is_that_of_finite_differences():
    """In float64, of the formula in NumPy: Σ_k T_k log T_k / S_k and the rest of both."""
    rng = np.random.default_rng(0)
    student, said = rng.normal(size=(2, 6)), np.log([[0.4, 0.3, 0.1], [0.9, 0.05, 0.04]])
    ids = np.array([[4, 0, 2], [1, 5, 3]])

    def formula(student):
        found = np.take_along_axis(np.exp(student) / np.exp(student).sum(-1, keepdims=True), ids, -1)
        told = np.exp(said)
        rest, kept = 1 - told.sum(-1), 1 - found.sum(-1)
        return ((told * np.log(told / found)).sum(-1) + rest * np.log(rest / kept)).sum()

    with jax.enable_x64(True):
        loss = lambda student: jnp.sum(distillation.stored_kl(student, jnp.asarray(ids), jnp.asarray(said)))  # noqa: E731
        value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(student))
    steps = 1e-6 * np.eye(student.size).reshape(-1, *student.shape)
    slopes = [(formula(student + step) - formula(student - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(value, formula(student), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.reshape(slopes, student.shape), rtol=1e-7, atol=1e-9)


def test_uld_through_the_scores_has_the_gradient_of_finite_differences():
    """Of a teacher with five tokens more, who reads the text in tokens of its own: in the student's last norm, of NumPy in float64."""
    student, teacher = (toy.init(jax.random.key(n)) for n in range(2))
    more = jax.random.normal(jax.random.key(3), (5, toy.DIM))
    teacher["embed_tokens"] = {"kernel": jnp.concatenate([teacher["embed_tokens"]["kernel"], more])}
    batch = toy.batch(jax.random.key(2))
    batch = dataclasses.replace(batch, teacher=dataclasses.replace(batch, tokens=toy.VOCAB + batch.tokens % 5))

    @jax.jit
    def evaluate(scale):
        def total(scale):
            params = {**student, "norm": {"scale": scale}, TEACHER: teacher}
            scores = scoring.score_against(toy.MODEL, toy.MODEL, params, batch, divergence=distillation.uld, chunk_tokens=4, outputs=())
            return losses.distill(scores, batch)[0].total

        texts = (student, batch.tokens), (teacher, batch.teacher.tokens)
        read = [toy.apply(params, tokens, segment_ids=batch.segment_ids)[0] for params, tokens in texts]
        return jax.value_and_grad(total)(scale), read

    (value, gradient), hidden = jax.device_get(evaluate(student["norm"]["scale"]))
    said = [x[:, :-1].astype(np.float64) for x in hidden]
    heads = [np.asarray(params["embed_tokens"]["kernel"], np.float64) for params in (student, teacher)]

    def falling(logits):
        p = np.exp(logits)
        return -np.sort(-p / p.sum(-1, keepdims=True), axis=-1)

    def formula(scale):
        ours, theirs = falling(said[0] * scale @ heads[0].T), falling(said[1] @ heads[1].T)
        ours = np.pad(ours, ((0, 0), (0, 0), (0, 5)))
        return (np.abs(ours - theirs).sum(-1) * np.asarray(batch.loss_mask)[:, 1:]).sum()

    slopes = [(formula(1 + step) - formula(1 - step)) / 2e-6 for step in 1e-6 * np.eye(toy.DIM)]
    np.testing.assert_allclose(value, formula(np.ones(toy.DIM)), rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)
