"""The shipped rewards by name, and rewards from a config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.rewards import sandbox
from ftjax.rewards.choice import choice
from ftjax.rewards.code import code
from ftjax.rewards.completion import Completion, Reward
from ftjax.rewards.environment import environment
from ftjax.rewards.exact import exact_match
from ftjax.rewards.extras import check
from ftjax.rewards.json_schema import json_schema
from ftjax.rewards.judge_model import endpoint_judge, judge_model
from ftjax.rewards.length import brevity, cosine, soft_overlong, target_length
from ftjax.rewards.maths import maths
from ftjax.rewards.numeric import numeric_match
from ftjax.rewards.reasoning import reasoning_gym
from ftjax.rewards.repetition import repetition
from ftjax.rewards.reward_model import reward_model
from ftjax.rewards.sentiment import sentiment
from ftjax.rewards.think import tag_count, tag_format, think_format
from ftjax.tree import nearest

REWARDS: dict[str, Reward] = {
    reward.__name__: reward
    for reward in (
        exact_match,
        numeric_match,
        choice,
        maths,
        reasoning_gym,
        code,
        json_schema,
        think_format,
        tag_format,
        tag_count,
        target_length,
        soft_overlong,
        cosine,
        brevity,
        repetition,
        sentiment,
        reward_model,
        judge_model,
        endpoint_judge,
        environment,
    )
}

CHECKS: dict[str, Callable[[], None]] = {
    "maths": functools.partial(check, "math_verify"),
    "json_schema": functools.partial(check, "jsonschema"),
    "reasoning_gym": functools.partial(check, "reasoning_gym"),
    "code": sandbox.check,
}
"""What a reward needs of the machine: raises, saying how to get it, where it is not there."""


def build(names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Reward]:
    """Return rewards by name with their options bound, for `judge`; all that can be wrong is found here and not in the run.

    Args:
      names: keys of `REWARDS`.
      options: keywords of each, by reward: `{"soft_overlong": {"max_tokens": 256, "soft_tokens": 64}}`. An option that is itself a reward
        (`cosine`'s `correct`) may be given by its name.

    Raises:
      ValueError: an unknown name or option, with the nearest ones.
      ImportError: a library is not installed, with the command that does.
      sandbox.NoIsolation: the kernel does not isolate processes, for rewards that run code.
    """
    options = options or {}
    for name in [*names, *options]:
        if name not in REWARDS:
            raise ValueError(f"rewards: there is no {name!r}; nearest: {nearest(name, REWARDS)}.")
        if name not in names:
            raise ValueError(f"rewards: options for {name!r}, which is not among the rewards {tuple(names)}.")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards: name at least one, and each once, not {tuple(names)}.")
    return {name: _bind(name, dict(options.get(name, {}))) for name in names}


def _bind(name: str, options: dict[str, Any]) -> Reward:
    """Return the reward with its options, which no column of the same name replaces: data sets do have a `model` or a `score`."""
    reward, signature = REWARDS[name], inspect.signature(REWARDS[name])
    known = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"rewards: {name!r} has no option {option!r}; nearest: {nearest(option, known)}.")
        if option == "correct" and isinstance(value, str):
            options[option] = build([value])[value]
    CHECKS.get(name, lambda: None)()
    asked = [p for p in signature.parameters.values() if p.default is p.empty and p.name not in options]
    hidden = signature.parameters.keys() - {p.name for p in asked}

    @functools.wraps(reward)
    def bound(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> Any:
        shown = {column: values for column, values in columns.items() if column not in hidden}
        return reward(prompts, completions, **options, **shown)

    bound.__signature__ = signature.replace(parameters=asked)  # what `judge` may ask of the rows
    return bound
