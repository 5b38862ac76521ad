"""The objective of a config: what it asks of the data and of the scores, and the two steps in which a model, a method and a loss meet."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ftjax import data, losses, models, peft, scoring, sharding
from ftjax.cli.config import named, plain
from ftjax.losses import distillation
from ftjax.train import Baseline, Carried, Score, Step, make_eval_step, make_reading, make_train_step
from ftjax.tree import nearest
from ftjax.types import Batch, LossFn, Mean, Metrics, Model, Params, Scores, TrainState, Transform


def needs(config) -> losses.Needs:
    """Return what the objective of `config.algorithm` asks for."""
    if config.algorithm not in losses.LOSSES:
        raise ValueError(f"algorithm: there is no {config.algorithm!r}; nearest: {nearest(config.algorithm, losses.LOSSES)}.")
    return losses.NEEDS[config.algorithm]


def loss(config) -> LossFn:
    """Return the objective of `config.algorithm` with the options of `config.loss`.

    A constant that sums over tokens are divided by is the most tokens of a sample unless `loss.max_tokens` is set, as in TRL.
    """
    needs(config)
    chosen, options = losses.LOSSES[config.algorithm], plain(config.loss)
    known = {name: taken.default for name, taken in inspect.signature(chosen).parameters.items() if taken.kind is taken.KEYWORD_ONLY}
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"loss.{unknown[0]}: {config.algorithm!r} has no such option; nearest: {nearest(unknown[0], known)}.")
    if "rollout" in config and (known | options).get("reduction") == "constant_length" and options.get("max_tokens") is None:
        options["max_tokens"] = config.rollout.max_tokens
    return partial(chosen, **options)


def loss_of_batch(config) -> LossFn:
    """Return the objective for batches as they are packed."""
    return losses.unpacked(loss(config)) if packs(config) else loss(config)


def packs(config) -> bool:
    """Return whether rows of a batch hold several items that the objective compares, so that they have to be taken apart."""
    return needs(config).data in (*data.COMPARED, data.ROLLOUTS) and config.data.packing != "none"


def taught(config) -> bool:
    """Return whether the objective compares with a teacher."""
    return "divergence" in needs(config).outputs


REFERENCES = ("live", "cached")
"""When the reference is asked: in every step, or once before the training."""


def asks_once(config) -> bool:
    """Return whether batches bring along what the reference says, which `ftjax.cli.reference` asked it before the training."""
    return needs(config).reference and config.get("reference", {}).get("logps") == "cached"


def remembers(config) -> tuple[str, ...]:
    """Return the names of what `carried` is made of."""
    moves = ("reference",) if config.get("reference", {}).get("every_steps") else ()
    return moves + (("rewards",) if needs(config).running else ())


def check_reference(config) -> None:
    """Refuse a `config.reference` that cannot be had; asked before anything is loaded."""
    chosen, wanted = config.reference.logps, needs(config)
    known = wanted.reference and wanted.data in data.KINDS  # before the run: what the policy samples is not
    if config.reference.every_steps and not known:
        raise ValueError(
            f"reference.every_steps: a reference follows the policy in objectives of pairs, and {config.algorithm!r} is none; set it to 0."
        )
    if config.reference.every_steps and chosen != "live":
        raise ValueError("reference.logps: a reference that follows the policy (every_steps) speaks anew in each step: set it to 'live'.")
    if config.reference.every_steps and not 0 < config.reference.alpha <= 1:
        raise ValueError(f"reference.alpha: the share of the policy is above 0 and at most 1, not {config.reference.alpha}.")
    if config.sweep and remembers(config):
        raise ValueError(f"sweep: members cannot remember {', '.join(remembers(config))} from step to step; run them one by one.")
    if chosen not in REFERENCES:
        raise ValueError(f"reference.logps: there is no {chosen!r}; nearest: {nearest(chosen, REFERENCES)}.")
    if chosen == "live":
        return
    if not known:
        raise ValueError(f"reference.logps: {config.algorithm!r} has no reference that could be 'cached'; leave it at 'live'.")
    if jax.process_count() > 1 or config.sweep:
        what = "a sweep" if config.sweep else f"a run of {jax.process_count()} processes"
        raise ValueError(f"reference.logps: 'cached' is not for {what}; set it to 'live'.")


def check_batch(config) -> None:
    """Refuse batches that are too few rows for the objective, or not rows enough at a time; asked before anything is loaded."""
    if needs(config).baseline and config.data.batch_size < 2:
        raise ValueError(
            f"data.batch_size: {config.algorithm!r} compares with what prompts of the same batch say of each other's responses; "
            f"set it to 2 or more, not {config.data.batch_size}."
        )
    if config.data.accumulation > 1 and compares_rows(config):
        raise ValueError(
            f"data.accumulation: {config.algorithm!r} compares all rows of a step with each other, and {config.data.accumulation} "
            "micro-batches would each compare their own; set it to 1. Several devices may hold the rows."
        )


def compares_rows(config) -> bool:
    """Return whether the objective, or one of the losses that it sums, compares the rows of a batch with each other."""
    names = plain(config.loss).get("losses", (config.algorithm,))
    return any(losses.NEEDS[name].whole_batch for name in names if name in losses.NEEDS)


def check_best_metric(config) -> None:
    """Refuse a `checkpoint.best_metric` that no evaluation will have; asked before anything is loaded."""
    if taught(config):
        divergence(config)
    responses = data.KINDS.get(needs(config).data, 1)
    shape = (1, responses, 2) if responses > 1 else (1, 2)
    row, number = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    of_items = ("desirable", "baseline", "desirable_share", "margins")
    rows = ("tokens", "loss_mask", "positions", "segment_ids", "reference_logps", "behavior_logps", "labels", *needs(config).fields)
    batch = Batch(**dict.fromkeys(rows, row) | dict.fromkeys(of_items, number))
    scores = Scores(**{name: row for name in _outputs(config)})
    metrics = jax.eval_shape(loss(config), scores, batch)[1]
    names = ("loss", *metrics, *(("perplexity",) if "nll" in metrics else ()))
    if "rollout" in config:  # judged by what they are worth, and not by the loss of given rows
        names = ("reward", *(f"rewards/{name}" for name in config.rewards), "length", "finished", "repetition")
    if config.checkpoint.best_metric not in names:
        raise ValueError(f"checkpoint.best_metric: there is no {config.checkpoint.best_metric!r}; the evaluation has {', '.join(names)}.")


def _outputs(config) -> tuple[str, ...]:
    """Return what is scored: what the objective needs, and of conversations the accuracy, with a teacher how often both agree."""
    wanted = needs(config)
    more = {"messages": ("greedy",), data.ROLLOUTS: ("entropy",)}.get(wanted.data, ())
    smooth = ("mean_logps",) if wanted.data == "messages" and config.loss.get("label_smoothing") else ()
    agree = ("agreement",) if taught(config) and teacher_block(config).divergence != "uld" else ()
    return (*wanted.outputs, *more, *smooth, *agree)


def score(config, model: Model, mesh: Mesh, outputs: tuple[str, ...] | None = None, *, teacher: Model | None = None) -> Score:
    """Return how tokens are scored: with what the objective and its metrics need, and no more."""
    outputs = outputs or _outputs(config)
    options = {"batch_shards": sharding.row_parts(mesh)}
    if needs(config).data == data.ROLLOUTS:
        options |= {"temperature": config.rollout.temperature, "entropy_gradient": bool(config.loss.get("entropy_coef"))}
    _refuse_near_sight(config, model)
    model = sharding.on_mesh(model, mesh)
    if "divergence" not in outputs:
        return partial(scoring.score, model, **options, outputs=outputs)
    options["outputs"] = tuple(name for name in outputs if name != "divergence")
    other = None if teacher is None else sharding.on_mesh(teacher, mesh)
    return partial(scoring.score_against, model, other, **options, divergence=divergence(config))


def _refuse_near_sight(config, model: Model) -> None:
    """Refuse prompts that stand once where attention counts places of the row: a prompt may lie further back than its positions say."""
    if not packs(config) or config.data.packing != "shared":
        return
    window = model.config.uniform_window
    if config.model.group_tokens or window is not None:
        what = "model.group_tokens" if config.model.group_tokens else f"a model whose every layer sees {window:,} tokens"
        raise ValueError(f"data.packing: 'shared' is not for {what}; set it to 'best_fit', where each response has its own prompt.")


def teacher_block(config) -> Any:
    """Return `config.teacher`.

    Raises:
      ValueError: there is none, and the objective needs it.
    """
    if "teacher" not in config:
        raise ValueError(f"teacher: {config.algorithm!r} needs a block config.teacher; begin the config with base.distilled().")
    return config.teacher


def on_policy(config) -> bool:
    """Return whether some steps learn from what the student writes itself."""
    return "student" in config and config.student.on_policy > 0 and taught(config)


def divergence(config) -> Callable[..., jax.Array]:
    """Return what `config.teacher` compares a token's two distributions by."""
    chosen = teacher_block(config)
    if chosen.file:
        if chosen.divergence != "forward_kl" or chosen.temperature != 1:
            raise ValueError("teacher.file: of stored tokens the forward KL is known; set teacher.divergence='forward_kl', temperature 1.")
        return distillation.stored_kl
    known = distillation.DIVERGENCES
    if chosen.divergence not in known:
        raise ValueError(f"teacher.divergence: there is no {chosen.divergence!r}; nearest: {nearest(chosen.divergence, known)}.")
    if chosen.temperature <= 0:
        raise ValueError(f"teacher.temperature: above 0, not {chosen.temperature}.")
    beta = {"beta": chosen.beta} if chosen.divergence == "jsd" else {}
    return partial(known[chosen.divergence], temperature=chosen.temperature, **beta)


def comparison(config, model: Model, mesh: Mesh) -> dict[str, Any]:
    """Return `complete` and `baseline` of `train.make_train_step`: how the objective gets to know its reference and the whole step."""
    wanted = needs(config)
    share = Baseline(lambda params, frozen, batch: losses.desirable_share(batch), losses.with_share) if wanted.share else None
    if not wanted.reference:
        return {"baseline": share} if share else {}
    look = score(config, model, mesh, ("logps",))

    def complete(frozen: Params, batch: Batch) -> Batch:
        if wanted.running and batch.baseline is None:
            batch = losses.with_baseline(batch, Mean(jnp.zeros(()), jnp.zeros(())))
        if batch.reference_logps is not None:
            return batch
        return losses.with_reference(batch, look(peft.reference(frozen), batch))

    def measure(params: Params, frozen: Params, batch: Batch) -> Mean:
        rows = complete(frozen, batch.mismatched)
        return losses.kl_baseline(look(params, rows), rows)

    return {"complete": complete, "baseline": Baseline(measure, losses.with_baseline) if wanted.baseline else share}


def reading(config, model: Model, mesh: Mesh, *, teacher: Model | None = None) -> Callable[[Params, Params, Batch], tuple[Mean, Metrics]]:
    """Return `(params, frozen, batch) -> (loss, metrics)`: the objective of a batch by itself, its reference and baseline included."""
    return make_reading(score(config, model, mesh, teacher=teacher), loss_of_batch(config), **comparison(config, model, mesh))


def carried(config, model: Model, mesh: Mesh, method: Transform) -> dict[str, Carried]:
    """Return what the objective remembers from step to step: a reference that follows the policy, a mean of what it saw."""
    look, wanted, moves = score(config, model, mesh, ("logps",)), needs(config), config.get("reference")

    def write(trainable: Params, frozen: Params, batch: Batch) -> Batch:
        params = method.attach(frozen, trainable)
        found = losses.with_reference(batch, look(params, batch))
        if batch.mismatched is None:
            return found
        return dataclasses.replace(found, mismatched=losses.with_reference(batch.mismatched, look(params, batch.mismatched)))

    def follow(reference: Params, done: jax.Array, trainable: Params, metrics: Metrics) -> Params:
        del metrics
        return losses.followed(reference, trainable, done, every_steps=moves.every_steps, alpha=moves.alpha)

    known = {
        "reference": Carried(lambda trainable: jax.tree.map(jnp.copy, trainable), write, follow),
        "rewards": Carried(
            lambda trainable: {name: Mean(jnp.zeros(()), jnp.zeros(())) for name in wanted.running},
            lambda seen, frozen, batch: losses.with_baseline(batch, *seen.values()),
            lambda seen, done, trainable, metrics: {name: mean + metrics[name] for name, mean in seen.items()},
        ),
    }
    return {name: known[name] for name in remembers(config)}


def in_training(config, model: Model) -> Model:
    """Return the model as a training step applies it: attention stays in groups of `config.model.group_tokens`, unless that is 0."""
    size = config.model.group_tokens
    if not size:
        return model
    return named("model.group_tokens", lambda size: models.build(model.config, remat=config.model.remat, group_tokens=size), size)


def train_step(
    config,
    model: Model,
    method: Transform,
    rule: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    *,
    teacher: Model | None = None,
) -> Step:
    """Return the training step of the config on a mesh, for states of the shapes of `state`."""
    return make_train_step(
        score(config, in_training(config, model), mesh, teacher=teacher),
        method,
        loss_of_batch(config),
        rule,
        accumulation=config.data.accumulation,
        state_sharding=sharding.state_shardings(state, mesh),
        carried=carried(config, model, mesh, method),
        **comparison(config, model, mesh),
    )


def eval_step(
    config, model: Model, method: Transform, mesh: Mesh, *, teacher: Model | None = None
) -> Callable[[Params, Params, Batch], Metrics]:
    """Return `evaluate(trainable, frozen, batch, remembered={}) -> metrics` of the config on a mesh."""
    read = score(config, model, mesh, teacher=teacher)
    remembered = carried(config, model, mesh, method)
    return make_eval_step(read, method, loss_of_batch(config), **comparison(config, model, mesh), carried=remembered)
