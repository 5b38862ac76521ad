"""The members of a sweep: `config.sweep` says in what they differ, and each is a config like any other.

    "optimizer.learning_rate=1e-4,3e-4 seed=0,1"         every combination: four members
    "lora.rank=4 lora.alpha=8; lora.rank=16,32"          the combinations of each part: three members

In a config file it may also be a mapping `{"seed": (0, 1), …}` for a part, or a sequence of parts.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax.cli import config as configs
from ftjax.peft import inits
from ftjax.tree import nearest

_TRACED = ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.final_fraction")
_PADDED = ("lora", "dora", "lora_fa")
"""Methods of which zeros along the rank add nothing and stay zeros, and whose scale enters arithmetic alone."""
_EXAMPLE = 'as in "optimizer.learning_rate=1e-4,3e-4 seed=0,1"'


class Member(NamedTuple):
    """One of the runs that are trained side by side."""

    options: Mapping[str, Any]
    """`{field of the config: value}`: what makes it this one."""
    config: ConfigDict
    """What it would be alone."""

    def value(self, name: str) -> Any:
        """Return the value of a field, whether it is one of its options or what all have."""
        block, field = _place(self.config, name)
        return block[field]

    @property
    def label(self) -> str:
        """What a table calls it: `learning_rate 0.0003, seed 1`."""
        return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in self.options.items())


def read(config: ConfigDict) -> list[Member]:
    """Return the members of `config.sweep`.

    Raises:
      ValueError: it cannot be read; a field is unknown or cannot be swept; a value is none for its field; two members are alike.
    """
    found: list[Member] = []
    for options in _combinations(config.sweep):
        for name, value in options.items():
            _check(name, value, config)
        one = Member(options, _changed(config, options))
        if twins := [n for n, other in enumerate(found) if other.config == one.config]:
            raise ValueError(f"sweep: members {twins[0]} and {len(found)} are both {one.label}.")
        found.append(one)
    return found


def sweepable(config: ConfigDict) -> tuple[str, ...]:
    """Return the fields in which members may differ: seeds and starts, and numbers that enter arithmetic and no shape but a rank."""
    starts = [name for name in config.methods if config.get(name, {}).get("init", "eva") not in inits.CALIBRATED]
    return ("seed", *_traceable(config), *(f"{name}.init" for name in starts))


def numbers(members: Sequence[Member]) -> dict[str, np.ndarray]:
    """Return `{field: float32 [n]}` for the fields of which the step has to know, where members name them."""
    named = dict.fromkeys(name for member in members for name in member.options)
    known = _traceable(members[0].config)
    return {name: np.array([member.value(name) for member in members], np.float32) for name in named if name in known}


def traced(config: ConfigDict, numbers: Mapping[str, Any]) -> ConfigDict:
    """Return the config with fields that may be abstract numbers: what `cli.build` then builds is that of any member."""
    config = config.copy_and_resolve_references()
    for name, value in numbers.items():
        block, field = _place(config, name)
        with block.ignore_type():
            block[field] = value
    return config


def _traceable(config: ConfigDict) -> tuple[str, ...]:
    # With `layers` a method asks its own plan inside the step, whose options are plain data.
    padded = [name for name in _PADDED if name in config.methods and config[name].layers is None]
    return (*_TRACED, *(f"{name}.{field}" for name in padded for field in ("rank", "alpha")))


def _combinations(sweep: Any) -> list[dict[str, Any]]:
    if isinstance(sweep, str):
        parts = [part for part in sweep.split(";") if part.strip()]
        if len(parts) != 1:
            return _combinations(parts)
        fields = _fields(parts[0])
    elif isinstance(sweep, (ConfigDict, Mapping)):
        fields = {name: list(values) if isinstance(values, (list, tuple)) else [values] for name, values in configs.fields(sweep).items()}
    else:
        return [options for part in sweep for options in _combinations(part)]
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def _fields(text: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for word in text.split():
        name, _, values = word.partition("=")
        if not values or "" in values.split(","):
            raise ValueError(f"sweep: {word!r} is not FIELD=VALUE,VALUE without spaces, {_EXAMPLE}.")
        if name in found:
            raise ValueError(f"sweep: {name} appears twice; list its values once, or part the combinations by a semicolon.")
        found[name] = [_value(value) for value in values.split(",")]
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check(name: str, value: Any, config: ConfigDict) -> None:
    possible = sweepable(config)
    if name not in possible:
        known = name in configs.fields(config)
        what = "is the same for all members" if known else f"is no field of the config; nearest: {nearest(name, possible)}"
        raise ValueError(f"sweep: {name} {what}. What can be swept here: {', '.join(possible)}.")
    if name.endswith(".init") and value in inits.CALIBRATED:
        raise ValueError(f"sweep: {name} {value!r} looks at the data, which is done once: set it for all members, or leave it out.")
    if name.endswith(".rank") and config.optimizer.name == "adafactor":
        raise ValueError(
            f"sweep: {name} cannot be swept with Adafactor, whose means over a matrix would count the zeros that smaller ranks are padded "
            "with; use another optimizer.name, or one run for each rank."
        )


def _changed(config: ConfigDict, options: Mapping[str, Any]) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.sweep = ""
    for name, value in options.items():
        block, field = _place(config, name)
        try:
            block[field] = value
        except (TypeError, ValueError) as error:
            raise ValueError(f"sweep: {name} is {type(block[field]).__name__} in the config, which {value!r} is not.") from error
    return config


def _place(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    *blocks, field = name.split(".")
    for block in blocks:
        config = config[block]
    return config, field
