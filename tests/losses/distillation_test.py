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
