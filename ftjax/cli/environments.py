"""The environment of a config: who answers the policy between its turns, or which tools it may call.

`config.rollout.environment` names one of `rollout.ENVIRONMENTS` or a class of your own, or functions that become tools. What they say is
read by the policy and never trained.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from ftjax import data, online, rollout
from ftjax.cli import runtime
from ftjax.cli.config import plain
from ftjax.rollout import environments, toolbox
from ftjax.tree import nearest

Change = Callable[[data.Example], data.Example]


_OF_TOOLS = {"parser": "hermes", "prompt": "", "seconds": 10.0}
"""Fields that tools alone have, and their defaults in `configs.base`."""


def used(config) -> bool:
    """Return whether episodes have turns: an environment or tools are named."""
    asked = config.get("rollout", {}).get("environment")
    return asked is not None and bool(asked.name or asked.tools)


def check(config) -> None:
    """Refuse what cannot be played, and rewards of an environment that there is not; asked before anything is loaded.

    Raises:
      ValueError: there is no such environment, tool or parser, a tool cannot be described, or settings do not fit together.
      sandbox.NoIsolation: a tool runs programs, and the kernel does not isolate them.
    """
    if not used(config):
        if "environment" in config.rewards:
            raise ValueError("rewards.environment: there is none; name it in rollout.environment.name, or take the reward out.")
        return
    asked = config.rollout.environment
    if asked.name and asked.tools:
        raise ValueError(
            "rollout.environment: name either an environment or tools; an environment that has tools makes a rollout.Toolbox itself."
        )
    if asked.name and (unread := [name for name, value in _OF_TOOLS.items() if asked[name] != value]):
        raise ValueError(
            f"rollout.environment.{unread[0]}: {asked[unread[0]]!r} is read where there are tools, and this is an environment; leave it at "
            f"{_OF_TOOLS[unread[0]]!r}. An environment has judging.timeout seconds."
        )
    if asked.max_turns < 1:
        raise ValueError(f"rollout.environment.max_turns: at least 1, not {asked.max_turns}.")
    if asked.seconds <= 0:
        raise ValueError(f"rollout.environment.seconds: above 0, not {asked.seconds}.")
    if config.eval.generate.examples or config.eval.samples:
        raise ValueError(
            "eval.generate.examples, eval.samples: these are answers of one turn, where nobody answers the policy; set them to 0. "
            "eval/reward is of whole episodes."
        )
    if asked.tools and config.data.template == "none":
        raise ValueError("data.template: tools are shown and answered in messages, and 'none' has none; choose 'chatml' or a template.")
    for name in asked.tools:
        environments.CHECKS.get(name, lambda: None)()
    factory(config)


def factory(config) -> rollout.environment.Factory:
    """Return what makes the environment of each episode."""
    asked = config.rollout.environment
    if asked.name:
        return found(asked.name, rollout.ENVIRONMENTS, field="rollout.environment.name")
    return partial(_shared, _toolbox(config))


def opened(config, encoder: data.Encoder) -> Change:
    """Return how prompts are shown to the policy: with its tools, or with what the environment says first."""
    if not used(config):
        return lambda example: example
    asked = config.rollout.environment
    if asked.tools:
        return partial(_shown, _toolbox(config).schemas, "tools" in encoder.template.reads(), asked.prompt or toolbox.HERMES_PROMPT)
    return partial(_begun, factory(config))


def sampler(config, engine: rollout.Engine, encoder: data.Encoder, sampling: rollout.Sampling) -> online.Sampler:
    """Return how prompts are answered, turn by turn.

    Raises:
      ValueError: the chat template does not show where a turn ends, or refuses what follows one.
    """
    asked, turns = config.rollout.environment, rollout.Turns(encoder)
    probe = data.Example(({"role": "user", "content": "a"},))
    turns.tokens(probe, [{"role": "tool" if asked.tools else "user", "name": "a", "content": "a"}], ended=True)
    stage = rollout.Stage(
        engine,
        turns,
        factory(config),
        max_tokens=config.rollout.max_tokens,
        max_turns=asked.max_turns,
        stop=tuple(asked.stop),
        seconds=config.judging.timeout,
        part=(jax.process_index(), jax.process_count()),
        gathered=runtime.gathered,
    )
    return online.player(stage, sampling=sampling)


def found(name: str, known: Mapping[str, Any], *, field: str) -> Any:
    """Return what a name stands for: an entry, or `FILE.py:NAME` or `MODULE:NAME` of the user's own.

    Raises:
      ValueError: there is nothing of that name, or its module cannot be imported.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in known:
            raise ValueError(
                f"{field}: there is no {name!r}; nearest: {nearest(name, known)}. Your own is 'FILE.py:NAME' or 'MODULE:NAME'."
            )
        return known[name]
    module = _from_file(pathlib.Path(where), field) if where.endswith(".py") else _imported(where, field)
    if attribute not in vars(module):
        raise ValueError(f"{field}: {where} has no {attribute!r}; nearest: {nearest(attribute, vars(module))}.")
    return vars(module)[attribute]


def _from_file(path: pathlib.Path, field: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{field}: there is no file {str(path)!r}.")
    return _executed(path.resolve(), path.stat().st_mtime_ns)


@functools.cache
def _executed(path: pathlib.Path, changed: int) -> Any:
    """Return the module of a file, executed once for each time that it was changed: what a config names is asked for more than once."""
    name = f"{path.stem}_of_config_{abs(hash((path, changed)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _imported(name: str, field: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: {error}; a file of your own is named as 'FILE.py:NAME'.") from error


def _toolbox(config) -> rollout.Toolbox:
    asked = plain(config.rollout.environment)
    tools = [found(name, rollout.TOOLS, field="rollout.environment.tools") for name in asked["tools"]]
    parser = found(asked["parser"], rollout.PARSERS, field="rollout.environment.parser")
    return rollout.Toolbox(tools, parser=parser, seconds=asked["seconds"])


def _shared(box: rollout.Toolbox) -> rollout.Toolbox:
    return box  # which remembers nothing


def _begun(make: rollout.environment.Factory, example: data.Example) -> data.Example:
    try:
        return rollout.opened(example, make)
    except Exception as error:
        raise ValueError(f"rollout.environment: reset failed on {example.where or 'a row'}: {type(error).__name__}: {error}") from error


def _shown(schemas: tuple[Any, ...], by_template: bool, prompt: str, example: data.Example) -> data.Example:
    if by_template:
        return dataclasses.replace(example, tools=schemas)
    said, messages = toolbox.described(schemas, prompt), list(example.messages)
    if messages and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{said}"}
    else:
        messages.insert(0, {"role": "system", "content": said})
    return dataclasses.replace(example, messages=tuple(messages))
