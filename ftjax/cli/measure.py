"""How good a model is: loss over held-out batches, and how many answers it gets exactly right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ftjax import data, rewards, rollout
from ftjax.tree import nearest
from ftjax.types import Batch, Mean, Metrics, Model, Params, TrainState

MATCHES = {"exact_match": rewards.exact_match, "numeric_match": rewards.numeric_match}
Z = 1.959964
"""The 97.5th percentile of the normal distribution: two-sided 95 %."""


def evaluate(step: Callable[[Batch], Metrics], batches: Iterable[Batch]) -> dict[str, float]:
    """Return the metrics over all batches, each a quotient of sums, and the perplexity where there is an `nll`.

    Args:
      step: `batch -> metrics`, from `train.make_eval_step`.
      batches: global batches, already on their devices.
    """
    return _values(_total(step, batches))


def evaluate_each(step: Callable[[Batch], Metrics], batches: Iterable[Batch], *, count: int) -> list[dict[str, float]]:
    """Return what `evaluate` would of each member of a sweep, from a `step` whose metrics are `[count]`."""
    total = _total(step, batches)
    return [_values({name: Mean(mean.total[n], mean.weight[n]) for name, mean in total.items()}) for n in range(count)]


def _total(step: Callable[[Batch], Metrics], batches: Iterable[Batch]) -> Metrics:
    total: Metrics = {}
    for batch in batches:
        found = step(batch)
        total = {name: total[name] + mean for name, mean in found.items()} if total else found
    if not total:
        raise ValueError("eval: there is no held-out batch.")
    return jax.device_get(total)


def _values(total: Metrics) -> dict[str, float]:
    values = {name: mean.value() for name, mean in total.items()}
    return values | ({"perplexity": math.exp(min(values["nll"], 700.0))} if "nll" in values else {})


def wilson(right: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927, J. Am. Stat. Assoc. 22): it stays inside [0, 1], also for 0 or n of n.

    (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n)

    >>> [round(bound, 4) for bound in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if not n:
        return 0.0, 1.0
    p, w = right / n, Z**2 / n
    half = Z * math.sqrt(p * (1 - p) / n + w / (4 * n))
    return max(0.0, (p + w / 2 - half) / (1 + w)), min(1.0, (p + w / 2 + half) / (1 + w))


class Answers(NamedTuple):
    """What a model wrote to held-out prompts, beside what was asked for."""

    prompts: list[str]
    completions: list[str]
    wanted: list[str]
    scores: list[float | None]

    @property
    def score(self) -> float:
        """The share of right answers among those that can be judged."""
        judged = [score for score in self.scores if score is not None]
        return sum(judged) / len(judged) if judged else float("nan")


def answer(
    model: Model,
    params: Params,
    encoder: data.Encoder,
    examples: Sequence[data.Example],
    *,
    max_tokens: int,
    batch_size: int,
    metric: str = "exact_match",
) -> Answers:
    """Complete the prompts of some examples greedily and compare with their last assistant messages.

    Args:
      model: the architecture.
      params: attached without a key, so that dropout is off.
      encoder: renders the prompts as in training.
      examples: held-out examples that end with an answer.
      max_tokens: of a completion.
      batch_size: prompts at a time.
      metric: a key of `MATCHES`.
    """
    if metric not in MATCHES:
        raise ValueError(f"eval.generate.metric: there is no {metric!r}; nearest: {nearest(metric, MATCHES)}.")
    completions = rollout.generate_text(
        model,
        params,
        encoder.tokenizer,
        [encoder.prompt(example) for example in examples],
        max_tokens=max_tokens,
        temperature=0.0,
        key=None,
        batch_size=batch_size,
        template=encoder.template.source if encoder.template else "none",  # which says what ends an answer
    )
    prompts, wanted = [question(example) for example in examples], [data.answer(example) for example in examples]
    scores = MATCHES[metric](prompts, completions, answer=[data.right_answer(example) for example in examples])
    return Answers(prompts, completions, wanted, scores)


@dataclasses.dataclass(frozen=True)
class Quiz:
    """Held-out prompts for a model in training: the same before, during and after."""

    model: Model
    attach: Callable[[TrainState], Params]
    encoder: data.Encoder
    examples: Sequence[data.Example]
    options: Mapping[str, Any]
    """`max_tokens`, `batch_size` and `metric` of `answer`."""

    def __call__(self, state: TrainState, count: int) -> Answers:
        """Return the answers to the first `count` prompts."""
        return answer(self.model, self.attach(state), self.encoder, self.examples[:count], **self.options)


def question(example: data.Example) -> str:
    """Return the last user message, to show."""
    return next((message["content"] for message in reversed(example.messages) if message["role"] == "user"), "")
