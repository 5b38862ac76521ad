"""Optimisers and schedules by name: optax, with learning-rate groups by path."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax

from ftjax import tree
from ftjax.optimizers8bit import scale_by_adam8bit, scale_by_lion8bit
from ftjax.types import Params


def schedule(
    name: str, *, learning_rate: float, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0, decay_steps: int | None = None
) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Every schedule rises linearly from 0 over `warmup_steps`; step 0 already takes 1 / (warmup_steps + 1) of the peak, so no step is wasted.

    Args:
      name: `constant`; `linear` or `cosine` decay to `final_fraction` of the peak at `steps`; `wsd`: constant, then linear decay over the
        last `decay_steps` (warmup-stable-decay, Hu et al., 2024, arXiv 2404.06395).
      learning_rate: the peak.
      steps: length of the run.
      warmup_steps: steps of rise.
      final_fraction: of the peak, at the end.
      decay_steps: of `wsd`; a tenth of the run if None.
    """
    final, rest = learning_rate * final_fraction, max(1, steps - warmup_steps)
    tail = max(1, steps // 10) if decay_steps is None else decay_steps
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction),
        "wsd": lambda: optax.linear_schedule(learning_rate, final, tail, transition_begin=max(0, rest - tail)),
    }
    if name not in after:
        raise ValueError(f"optimizer.schedule: there is no {name!r}; nearest: {tree.nearest(name, after)}.")
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([rise, after[name]()], [warmup_steps]) if warmup_steps else after[name]()


def scale_by_path(groups: Sequence[tuple[tree.Filter, float]]) -> optax.GradientTransformation:
    """Multiply the updates of each leaf by the value of the first group that matches its path in the trainable tree; 1 if none does.

    LoRA+ (Hayou et al., 2024, arXiv 2402.12354) is `[(r"lora/.*/b", 16.0)]`.

    Raises:
      ValueError: at `init`, if a group matches nothing.
    """

    def init(params: Params) -> optax.EmptyState:
        for filter, _ in groups:
            tree.matches(params, filter, who="optimizer.groups")
        return optax.EmptyState()

    def update(updates: Params, state: optax.EmptyState, params: Params | None = None):
        del params
        multipliers = {path: tree.first_match(groups, path) for path in tree.flatten(updates)}
        scaled = {path: leaf if multipliers[path] is None else leaf * multipliers[path] for path, leaf in tree.flatten(updates).items()}
        return tree.unflatten(scaled), state

    return optax.GradientTransformation(init, update)


def _decayed(params: Params) -> Params:
    """Decay matrices; biases, norms and vectors are left alone."""
    return tree.unflatten({path: path.split("/")[-1] not in ("bias", "scale") for path in tree.flatten(params)})


def build(
    name: str,
    *,
    learning_rate: float,
    steps: int,
    schedule_name: str = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    decay_steps: int | None = None,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float | None = None,
    eps: float = 1e-8,
    momentum: float = 0.0,
    clip_norm: float | None = 1.0,
    groups: Sequence[tuple[tree.Filter, float]] = (),
) -> optax.GradientTransformation:
    """Return the optax transformation for a run.

    clip by global norm → update rule → weight decay → learning rate → group multipliers; decay is decoupled (Loshchilov and Hutter, 2017,
    arXiv 1711.05101) and scales with the learning rate, as in PyTorch.

    Args:
      name: `adamw`, `lion` (arXiv 2302.06675), `adafactor` (arXiv 1804.04235) or `sgd`; `adamw8bit` and `lion8bit` keep their moments in
        eight bits (arXiv 2110.02861).
      learning_rate: the peak.
      steps: length of the run.
      schedule_name: see `schedule`, also for the next three.
      warmup_steps: steps of rise.
      final_fraction: of the peak, at the end.
      decay_steps: of `wsd`.
      weight_decay: of everything but biases, norms and vectors.
      b1: first-moment decay of AdamW and Lion.
      b2: second-moment decay of AdamW, 0.999 if None; slow momentum of Lion, 0.99 if None.
      eps: AdamW's guard against division by zero.
      momentum: of SGD.
      clip_norm: largest global gradient norm; None leaves it alone.
      groups: learning-rate multipliers by path; see `scale_by_path`.
    """
    rules = {
        "adamw": lambda: optax.scale_by_adam(b1=b1, b2=0.999 if b2 is None else b2, eps=eps),
        "lion": lambda: optax.scale_by_lion(b1=b1, b2=0.99 if b2 is None else b2),
        "adamw8bit": lambda: scale_by_adam8bit(b1=b1, b2=0.999 if b2 is None else b2, eps=eps),
        "lion8bit": lambda: scale_by_lion8bit(b1=b1, b2=0.99 if b2 is None else b2),
        "adafactor": lambda: optax.scale_by_factored_rms(),
        "sgd": lambda: optax.trace(decay=momentum) if momentum else optax.identity(),
    }
    if name not in rules:
        raise ValueError(f"optimizer.name: there is no {name!r}; nearest: {tree.nearest(name, rules)}.")
    rate = schedule(
        schedule_name,
        learning_rate=learning_rate,
        steps=steps,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
        decay_steps=decay_steps,
    )
    traced = isinstance(weight_decay, jax.Array)  # of members of a sweep, some of which may have none
    parts = [
        optax.clip_by_global_norm(clip_norm) if clip_norm else None,
        rules[name](),
        optax.clip_by_block_rms(1.0) if name == "adafactor" else None,
        optax.add_decayed_weights(weight_decay, mask=_decayed) if traced or weight_decay else None,
        optax.scale_by_learning_rate(rate),
        scale_by_path(groups) if groups else None,
    ]
    return optax.chain(*(part for part in parts if part is not None))
