"""Objectives by example, and one program that evaluates them all, so that a law or a golden value costs no compilation of its own."""

import dataclasses
import pathlib
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from ftjax import losses
from ftjax.types import Batch, LossFn, Scores

B, T = 8, 7
HALF = B // 2
SHAPES = {"rows": (), "rollouts": (), "pairs": (2,), "triples": (3,)}


class Example(NamedTuple):
    loss: LossFn
    form: str = "pairs"
    reads: str = "logps"
    trl: str = ""  # the name in the golden file
    adds: bool = True  # over micro-batches
    differentiable: bool = True  # no part of the value is taken as constant in the gradient


def example(name, trl="", *, form="pairs", reads="logps", adds=True, differentiable=True, **options):
    return Example(partial(losses.LOSSES[name], **options), form, reads, trl, adds, differentiable)


def pair(name, trl="", **options):
    return [example(name, trl, beta=0.3, **options)]


unpaired = partial(example, form="rows", beta=0.3)
triple = partial(example, form="triples", beta=0.3, nll_coef=0.7)


def rollout(name, trl="", *, without=(), **options):
    """An objective of rollouts, of a batch without some fields: "old_logps", as at the first step on them."""
    found = example(name, trl, form="rollouts", **options)
    loss = lambda scores, batch: found.loss(scores, dataclasses.replace(batch, **dict.fromkeys(without)))  # noqa: E731
    return found._replace(loss=loss) if without else found


first_step = partial(rollout, without=("old_logps", "old_values"), differentiable=False)

EXAMPLES = {
    "sft": [example("sft", form="rows"), example("sft", form="rows", label_smoothing=0.1)],
    "dpo": [
        *pair("dpo", "dpo/sigmoid"),
        *pair("dpo", label_smoothing=0.1),
        *pair("dpo", "dpo/ld", tail_weight=0.4),
        *pair("dpo", "dpo/forward_kl", divergence="forward_kl"),
        *pair("dpo", "dpo/js_divergence", divergence="js"),
        *pair("dpo", "dpo/alpha_divergence", divergence="alpha"),
    ],
    "rpo": pair("rpo"),
    "mpo": pair("mpo", "dpo/mpo"),
    "wpo": [example("wpo", "dpo/wpo", beta=0.3, differentiable=False)],
    "sigmoid_norm": pair("sigmoid_norm", "dpo/sigmoid_norm"),
    "robust": pair("robust", "dpo/robust", label_smoothing=0.1),
    "hinge": pair("hinge", "dpo/hinge"),
    "ipo": [*pair("ipo", "dpo/ipo"), example("ipo", beta=1e-3)],
    "ipo_sum": pair("ipo_sum"),
    "exo": pair("exo", "dpo/exo_pair", label_smoothing=0.05),
    "nca": pair("nca", "dpo/nca_pair"),
    "bco_pair": pair("bco_pair", "dpo/bco_pair"),
    "sppo_hard": pair("sppo_hard", "dpo/sppo_hard"),
    "aot": pair("aot", "dpo/aot", label_smoothing=0.1, adds=False),
    "aot_unpaired": pair("aot_unpaired", "dpo/aot_unpaired", label_smoothing=0.1, adds=False),
    "apo_zero": pair("apo_zero", "dpo/apo_zero"),
    "apo_down": pair("apo_down", "dpo/apo_down"),
    "discopop": pair("discopop", "dpo/discopop"),
    "orpo": pair("orpo", "orpo"),
    "cpo": [
        *pair("cpo", "cpo/sigmoid", nll_coef=0.7),
        *pair("cpo", "cpo/hinge", losses={"hinge": 1.0}, nll_coef=0.7),
        *pair("cpo", "cpo/ipo", losses={"ipo": 1.0}, nll_coef=0.7),
        *pair("cpo", "cpo/smoothed", label_smoothing=0.1, nll_coef=0.0),
    ],
    "simpo": [*pair("simpo", "cpo/simpo", margin=0.5), example("simpo", label_smoothing=0.1, nll_coef=0.5)],
    "alphapo": [*pair("alphapo", "cpo/alphapo", margin=0.5), example("alphapo", alpha=-0.5)],
    "tpo": [triple("tpo", "tpo/sigmoid")],
    "tpo_l": [triple("tpo_l", "tpo/tpo-l", margin=0.5)],
    "kto": [unpaired("kto", "kto", undesirable_weight=1.5)],
    "apo_zero_unpaired": [unpaired("apo_zero_unpaired", "kto/apo_zero_unpaired")],
    "bco": [unpaired("bco", "bco")],
    "bco_balanced": [unpaired("bco_balanced")],
    "reward": [example("reward", "reward", reads="values"), example("reward", "reward/margin", reads="values", centering_coef=0.01)],
    "process_reward": [example("process_reward", form="rows", reads="values")],
    "distill": [example("distill", form="rows", reads="divergence")],
    "reinforce": [rollout("reinforce"), first_step("reinforce")],
    "remax": [rollout("remax")],
    "opo": [rollout("opo")],
    "reinforce_plus_plus": [rollout("reinforce_plus_plus")],
    "rloo": [rollout("rloo", "rloo")],
    "grpo": [
        rollout("grpo", "grpo/grpo"),
        first_step("grpo", "grpo/first"),
        rollout("grpo", "grpo/two_sided", ratio_cap=1.5),
        rollout("grpo", "grpo/kl", kl_coef=0.3),
        rollout("grpo", "grpo/kl_unweighted", kl_coef=0.3, kl_weighted=False),
        *(rollout("grpo", kl_coef=0.3, kl=kl, differentiable="+" not in kl) for kl in ("k1", "k2", "k1+", "k3+")),
        rollout("grpo", "grpo/entropy_bonus", entropy_coef=0.2),
        rollout("grpo", "grpo/top_entropy", entropy_share=0.35),
        *(rollout("grpo", f"grpo/{name}", correction=name) for name in ("token_truncate", "token_mask", "sequence_truncate")),
        rollout("grpo", "grpo/off_policy", off_policy_threshold=0.1),
        rollout("grpo", "grpo/sequence_mask", correction="sequence_mask", correction_cap=9.0),
    ],
    "bnpo": [rollout("bnpo", "grpo/bnpo")],
    "dr_grpo": [rollout("dr_grpo", "grpo/dr_grpo", max_tokens=6)],
    "dapo": [rollout("dapo", "grpo/dapo"), first_step("dapo", kl_coef=0.3)],
    "cispo": [rollout("cispo", "grpo/cispo", clip_high=0.5, differentiable=False)],
    "gspo": [rollout("gspo", "grpo/gspo", clip_low=0.2, clip_high=0.2), rollout("gspo", kl_coef=0.3)],
    "gspo_token": [rollout("gspo_token", "gspo_token", clip_low=0.2, clip_high=0.2, differentiable=False)],
    "luspo": [rollout("luspo", "grpo/luspo", clip_low=0.2, clip_high=0.2)],
    "sapo": [rollout("sapo", "grpo/sapo")],
    "vespo": [rollout("vespo", "grpo/vespo", differentiable=False)],
    "gmpo": [rollout("gmpo", "gmpo")],
    "ppo": [
        rollout("ppo", value_coef=0.7),
        rollout("ppo", reads="values", value_coef=0.7),
        first_step("ppo", kl_coef=0.3),
        rollout("ppo", reduction="sequence_mean", kl_coef=0.3, kl_weighted=False),
        rollout("ppo", reads="values", reduction="sequence_mean"),
    ],
    "nash_md": [rollout("nash_md", "nash_md", beta=0.3, differentiable=False)],
    "xpo": pair("xpo", "xpo", alpha=0.1),
    "rejection_sampling": [example("rejection_sampling", form="rows")],
    "npo": [unpaired("npo")],
    "gradient_difference": [example("gradient_difference", form="rows")],
}
NAMED = {f"{name}{n}": found for name, examples in EXAMPLES.items() for n, found in enumerate(examples)}


def make_problem(form, dtype=np.float32):
    """Random scores of responses after a prompt of one token or more; the last row only fills the batch."""
    shape = (B, *SHAPES[form])
    rng = np.random.default_rng(len(form))
    starts, ends = rng.integers(1, 3, (*shape, 1)), rng.integers(3, T + 1, (*shape, 1))
    ends[-1] = 0
    mask = (np.arange(T) >= starts) & (np.arange(T) < ends)
    real = lambda low, high, shape=(*shape, T): rng.uniform(low, high, shape)  # noqa: E731
    ints = np.broadcast_to(np.arange(T), mask.shape)
    said = {"logps": real(-2, -0.1), "entropy": real(0, 1), "mean_logps": real(-4, -3), "greedy": real(0, 1) > 0.5}
    scores = Scores(
        **{name: x * mask for name, x in said.items()}, log_collision=real(-2, 0) * mask, values=real(-1, 1), divergence=real(0, 1)
    )
    batch = Batch(
        ints,
        mask,
        ints,
        (np.arange(T) < ends).astype(ints.dtype),
        reference_logps=real(-2, -0.1) * mask,
        desirable=np.arange(B) % 2 > 0,
        baseline=np.full(B, 0.3),
        desirable_share=np.full(B, 3 / 7),
        density_ratios=real(0.1, 2, B),
        margins=real(0, 1, B),
        labels=real(0, 1) > 0.5,
        behavior_logps=real(-2, -0.1) * mask,
        old_logps=real(-2, -0.1) * mask,
        advantages=real(-1, 1, B),
        returns=real(-1, 1),
        old_values=real(-1, 1),
    )
    return jax.tree.map(lambda x: np.asarray(x, np.int32 if x.dtype == ints.dtype else dtype), (scores, batch))


def make_problems(dtype=np.float32):
    return {form: make_problem(form, dtype) for form in SHAPES}


def halves_of(problems):
    return [jax.tree.map(lambda x, h=h: x[h * HALF : (h + 1) * HALF], problems) for h in range(2)]


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
def _evaluate(problems):
    found = {}
    for name, (loss, form, reads, *_) in NAMED.items():
        scores, batch = problems[form]

        def total(x, loss=loss, scores=scores, batch=batch, reads=reads):
            mean, metrics = loss(dataclasses.replace(scores, **{reads: x}), batch)
            return mean.total, (mean, metrics)

        gradient, (mean, metrics) = jax.grad(total, has_aux=True)(getattr(scores, reads))
        found[name] = mean, metrics, gradient
    return found


def evaluate(problems):
    """Return `{name: (loss, metrics, gradient)}` of every example as numpy arrays."""
    return jax.device_get(_evaluate(problems))


def evaluate64(problems):
    with jax.enable_x64(True):
        return evaluate(problems)


def said(loss, scores, batch):
    """Return what `loss` says, as numpy arrays, in one program: step by step every operation would be compiled for itself."""
    return jax.device_get(jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})(scores, batch))


GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = {key: x for name in ("", "_removed", "_policy", "_policy_removed") for key, x in np.load(GOLDENS / f"trl{name}.npz").items()}


def golden_problems(**fields):
    """Return what TRL was given as `make_problems` has it, with other fields of every batch as named."""
    made = {}
    for form, (scores, batch) in halves_of(make_problems(np.float64))[0].items():
        if form == "rollouts":
            made[form] = tuple(dataclasses.replace(x, **of_golden_rollouts(type(x))) for x in (scores, batch))
            continue
        part = np.s_[:, : SHAPES[form][0]] if SHAPES[form] else np.s_[:, 0]
        mask = GOLDEN["loss_mask"][part]
        real = np.cumsum(mask[..., ::-1], -1)[..., ::-1] > 0  # up to the last token that counts
        known = {name: GOLDEN[name][part] for name in ("logps", "log_collision")}
        if form == "pairs":
            known["values"] = np.broadcast_to(GOLDEN["rewards"][..., None], mask.shape)
        if form == "triples":
            known["logps"] = np.pad(log_softmax(GOLDEN["triple_logits"])[:, :, :-1, 0], ((0, 0), (0, 0), (1, 0))) * mask
        given = {"loss_mask": mask, "segment_ids": real.astype(np.int32), "reference_logps": GOLDEN["reference_logps"][part]}
        given |= {"desirable": GOLDEN["desirable"], "density_ratios": np.ones(HALF), "margins": np.zeros(HALF)} | fields
        made[form] = dataclasses.replace(scores, **known), dataclasses.replace(batch, **given)
    return made


def of_golden_rollouts(kind):
    """Return the fields of scores or of a batch that `golden_policy.py` gave to TRL."""
    given = {name.removeprefix("problem/"): x for name, x in GOLDEN.items() if name.startswith("problem/")}
    return {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
