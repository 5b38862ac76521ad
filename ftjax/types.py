"""The nouns that every other file speaks of: parameters, models, transforms, batches, scores, means and the training state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A nested dict with slash paths. A leaf is a `jax.Array` or an `ftjax.weights.Weight`; whatever is not a dict is a leaf.
Params = dict[str, Any]
Metrics = dict[str, "Mean"]
TEACHER = "teacher"
"""The branch of the frozen parameters that holds another model's, for `scoring.score_against`; no method sees it."""
BRANCH = 1 << 20
"""Segment n + r · BRANCH, r = 1, 2, …, is a continuation of segment n, which it sees as if it stood before it: see `Batch.segment_ids`."""
VALUE_HEAD = "value_head"
"""The branch of the parameters that makes values of hidden states, `{"kernel": [d, 1], "bias": [1]}`; `peft.value_head` adds it."""


def pytree(cls):
    """Make `cls` a frozen dataclass that is a pytree; `static()` fields are part of its structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static(**options) -> Any:
    """Declare a dataclass field that is plain data: hashed and compared, never traced."""
    return dataclasses.field(metadata={"static": True}, **options)


class Model(NamedTuple):
    """A language model as pure functions over a plain parameter tree."""

    config: Any
    """The architecture: plain data with a strict schema."""
    init: Callable[[jax.Array], Params]
    """`init(key) -> params`: random weights; under `jax.eval_shape` the shapes of the whole model."""
    apply: Callable[..., tuple[jax.Array, Any]]
    """`apply(params, tokens, *, positions=None, segment_ids=None, cache=None) -> (hidden [b, t, d], cache)`."""
    head: Callable[[Params], Params]
    """`head(params)`: the leaves that `unembed` reads, so that a loss can treat them apart from the trunk."""
    unembed: Callable[[Params, jax.Array], jax.Array]
    """`unembed(head(params), hidden [..., d]) -> logits [..., v]` in float32, soft-cap included."""


class Plan(NamedTuple):
    """What one rule of a transform does to a tree: the row of the printed table and the source of exported configs."""

    method: str
    """The transform's name, which is also its key in the trainable tree."""
    rule: str
    """The filter as the user wrote it."""
    paths: tuple[str, ...]
    """The leaves it matched."""
    options: Mapping[str, Any] = {}
    """Plain data such as `{"rank": 16, "alpha": 32.0}`."""
    kind: str = ""
    """The method's name in `peft.METHODS` and `peft.FORMATS`, where the user may have given the transform another."""

    @property
    def known_as(self) -> str:
        """The method's name in `peft.METHODS`, whatever the user calls it."""
        return self.kind or self.method


def _unchanged(optimizer: Any) -> Any:
    return optimizer


def _none(trainable: Any) -> Mapping[str, jax.Array]:
    del trainable
    return {}


class Transform(NamedTuple):
    """A fine-tuning method: a function from one parameter tree to two, and back to one that a model can apply."""

    init: Callable[[jax.Array, Params], tuple[Params, Params]]
    """`init(key, params) -> (frozen, trainable)`. `trainable` is `{method name: tree}`; `frozen` shares the buffers of `params`."""
    attach: Callable[..., Params]
    """`attach(frozen, trainable, *, key=None) -> params`. Without a key nothing is random: dropout and noise are off."""
    plan: Callable[[Params], tuple[Plan, ...]]
    """`plan(params)`: the rules and what they match, from shapes alone."""
    optimizer: Callable[[Any], Any] = _unchanged
    """`optimizer(rule) -> rule`: what the method does to the optax transformation of a run, which goes over the whole trainable tree.
    `train.init_state` and `train.make_train_step` apply it, so that nobody has to remember it."""
    metrics: Callable[[Params], Mapping[str, jax.Array]] = _none
    """`metrics(trainable) -> {name: scalar}`: what the method says of its own arrays; a training step reports it."""


@pytree
class Batch:
    """Token sequences and what the objective needs to know of them.

    Leading axes `[*b]` are `[b]`, `[b, 2]` for pairs (chosen first) or `[p, g]` for groups of samples.
    """

    tokens: jax.Array
    """int `[*b, t]`."""
    loss_mask: jax.Array
    """float `[*b, t]`: 1 where the token at `t` is to be predicted (from those before it). The first token of a segment never is."""
    positions: jax.Array
    """int `[*b, t]`: the index within the segment, for RoPE."""
    segment_ids: jax.Array
    """int `[*b, t]`: 1, 2, … for the documents packed into a row, 0 for padding. What stands behind a document more than once has segments
    of its own, n + `BRANCH`, n + 2 · `BRANCH`, … behind document n: they see it and themselves, and their positions go on from it."""
    reference_logps: jax.Array | None = None
    """float `[*b, t]`: what the frozen anchor says of `tokens`, as `Scores.logps`; `losses.with_reference` writes it."""
    behavior_logps: jax.Array | None = None
    """float `[*b, t]`: what the sampler says of the tokens it drew, under the distribution that it drew them from."""
    old_logps: jax.Array | None = None
    """float `[*b, t]`: what the policy said before its first step on these rollouts; NaN, or None, where it is the policy itself, at that
    step."""
    advantages: jax.Array | None = None
    """float `[*b]`, one a response, or `[*b, t]`: how much better it was than expected; see `losses.advantages`."""
    returns: jax.Array | None = None
    """float `[*b, t]`: what followed from `tokens[t]` on, the target of the value of the state that it was drawn in."""
    old_values: jax.Array | None = None
    """float `[*b, t]`: `Scores.values` of the policy before its first step on these rollouts."""
    desirable: jax.Array | None = None
    """float or bool `[b]`: 1 where an unpaired response is a good one."""
    places: jax.Array | None = None
    """int `[b, k, n, t]`: where the tokens of the n responses of k items lie in a packed row, -1 for none: see `losses.unpacked`."""
    mismatched: Batch | None = None
    """`[b]` rows more: each prompt with a response to another one, which estimate how far the policy has moved (KTO)."""
    baseline: jax.Array | None = None
    """float `[b]`: what the reward of a response is compared with, the same in all rows of a step; `losses.with_baseline` writes it."""
    desirable_share: jax.Array | None = None
    """float `[b]`: the share of the desirable among all responses of a step, where the batch is a part of it; `losses.with_share` writes
    it."""
    density_ratios: jax.Array | None = None
    """float `[b]`: p(desirable | prompt) / p(undesirable | prompt), by which an undesirable response may be weighed (BCO)."""
    margins: jax.Array | None = None
    """float `[b]`: by how much the chosen response of a pair is better, where that was labelled."""
    labels: jax.Array | None = None
    """float `[*b, t]`: 1 where the step that ends at this token is right, 0 where it is wrong; read where `loss_mask` is 1."""
    teacher: Batch | None = None
    """The same texts in a teacher's own tokens, `[*b, s]`: the n-th token that counts here is compared with the n-th that counts there."""
    teacher_ids: jax.Array | None = None
    """int `[*b, t, k]`: the tokens that a stored teacher found most likely in the place of `tokens[t]`."""
    teacher_logps: jax.Array | None = None
    """float `[*b, t, k]`: what it said of them."""


@pytree
class Scores:
    """What a policy says of given tokens, in float32; all but `values` are zero wherever `loss_mask` is zero."""

    logps: jax.Array
    """`[*b, t]`: the log-probability of `tokens[t]` given the tokens before it."""
    entropy: jax.Array | None = None
    """`[*b, t]`: of the distribution that `tokens[t]` was drawn from, in nats; carries a gradient if scoring is asked to."""
    mean_logps: jax.Array | None = None
    """`[*b, t]`: the mean log-probability over the vocabulary (for label smoothing)."""
    greedy: jax.Array | None = None
    """`[*b, t]`: 1 where `tokens[t]` was the most likely token."""
    log_collision: jax.Array | None = None
    """`[*b, t]`: log Σ_v π(v)², what the policy gives a token of its own on average; carries no gradient."""
    divergence: jax.Array | None = None
    """`[*b, t]`: how far the distribution that `tokens[t]` was drawn from is from a teacher's."""
    agreement: jax.Array | None = None
    """`[*b, t]`: 1 where the most likely token is the teacher's too."""
    values: jax.Array | None = None
    """`[*b, t]`: a value head's prediction when `tokens[..t]` are read, at every token that is not padding, whatever `loss_mask` says. The
    baseline of `logps[t]`, the value of the state that `tokens[t]` was drawn in, is therefore `values[t-1]`; the reward of a text is
    `values` at its last token."""


@pytree
class Mean:
    """A mean that has not been divided yet: `total / weight`.

    Means add, over micro-batches, devices and steps alike, so the quotient taken once on the host is exact.
    """

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """Return the quotient on the host; NaN if nothing was counted."""
        weight = float(np.asarray(self.weight))
        return float(np.asarray(self.total)) / weight if weight else float("nan")


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Return the mean of `values` where `mask` is 1; a masked value counts as 0 even if it is not finite."""
    return Mean(jnp.sum(jnp.where(mask > 0, values, 0) * mask), jnp.sum(mask))


@pytree
class TrainState:
    """All that a step changes, and all that a checkpoint of the training needs beside the data position."""

    step: jax.Array
    key: jax.Array
    trainable: Params
    opt_state: Any
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What an objective remembers from one step to the next: see `train.Carried`."""


LossFn = Callable[[Scores, Batch], tuple[Mean, Metrics]]
RewardFn = Callable[..., Sequence[float | None]]
