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


OPTIONS = frozenset({"ask", "score", "url", "model", "target_tokens", "max_tokens", "soft_tokens"})
"""What shipped rewards have no default for and no column of the rows can be; all else without a default is a column."""


def build(chosen: Sequence[str] | Mapping[str, str | Reward], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Reward]:
    """Return rewards by name with their options bound, for `judge`; all that can be wrong is found here and not in the run.

    Args:
      chosen: keys of `REWARDS`, or `{name: reward}`, where a reward is such a key or a function of your own with TRL's signature: it is
        called by keywords, with all columns if it takes any (`**kwargs`) and else with those that it names. One reward may have several
        names.
      options: keywords of each, by name: `{"soft_overlong": {"max_tokens": 256, "soft_tokens": 64}}`. An option that is itself a reward
        (`cosine`'s `correct`) may be given by its name.

    >>> def polite(completions, *, word="please", **columns):
    ...     return [float(word in completion) for completion in completions]
    >>> rewards = build({"polite": polite, "thankful": polite}, {"thankful": {"word": "thank"}})
    >>> rewards["thankful"](["Hello"], ["I thank you."])
    [1.0]

    Raises:
      ValueError: an unknown name or option, with the nearest ones, or an option without a default that is not given.
      ImportError: a library is not installed, with the command that does.
      sandbox.NoIsolation: the kernel does not isolate processes, for rewards that run code.
    """
    options, names = options or {}, list(chosen)
    for name in options:
        if name not in names:
            raise ValueError(f"rewards: options for {name!r}, which is not among the rewards {tuple(names)}.")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards: name at least one, and each once, not {tuple(names)}.")
    by_name = chosen if isinstance(chosen, Mapping) else {name: name for name in names}
    return {name: _bind(name, by_name[name], dict(options.get(name, {}))) for name in names}


def _bind(name: str, chosen: str | Reward, options: dict[str, Any]) -> Reward:
    """Return the reward with its options, which no column of the same name replaces: data sets do have a `model` or a `score`."""
    if isinstance(chosen, str) and chosen not in REWARDS:
        raise ValueError(f"rewards: there is no {chosen!r}; nearest: {nearest(chosen, REWARDS)}.")
    reward = REWARDS[chosen] if isinstance(chosen, str) else chosen
    if not callable(reward):
        raise ValueError(f"rewards: {name!r} is {reward!r}, which is no function and no name of one.")
    signature = inspect.signature(reward)
    parameters = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = {p.name for p in parameters} - {"prompts", "completions"}
    for option in options:
        if option not in known:
            raise ValueError(f"rewards: {name!r} has no option {option!r}; nearest: {nearest(option, known)}.")
    asked = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if "correct" in known and isinstance(chosen, str):  # a reward that says which answers are right; what that needs is needed too
        correct = options.get("correct", signature.parameters["correct"].default)
        options["correct"] = _bind(correct if isinstance(correct, str) else "correct", correct, {})
        asked += [one for one in inspect.signature(options["correct"]).parameters if one not in (*asked, *options)]
    if isinstance(chosen, str):
        CHECKS.get(chosen, lambda: None)()
        if absent := [option for option in asked if option in OPTIONS]:
            raise ValueError(f"rewards: {name!r} needs the option {absent[0]!r}, which no column of the rows can be.")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    hidden = known - set(asked) if isinstance(chosen, str) else options.keys()  # TRL's rewards have defaults for columns
    heard = {p.name for p in parameters}

    @functools.wraps(reward)
    def bound(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> Any:
        shown = {column: values for column, values in columns.items() if column not in hidden and (takes_any or column in heard)}
        if isinstance(chosen, str):
            return reward(prompts, completions, **options, **shown)
        texts = {"prompts": prompts, "completions": completions}
        return reward(**{name: texts[name] for name in texts if takes_any or name in heard}, **options, **shown)

    # What `judge` may ask of the rows.
    bound.__signature__ = inspect.Signature([inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY) for one in asked])
    return bound
