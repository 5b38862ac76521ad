"""The rewards that a config names, the shipped ones and the user's own, and what they ask of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ftjax import data, rewards
from ftjax.cli import environments
from ftjax.cli.config import plain
from ftjax.tree import nearest

Load = Callable[..., Callable[..., Any]]
"""`(name of a model, **options) -> function`."""


class Made(NamedTuple):
    """How a config speaks of a reward that is a model: by fields, of which an option of the reward is made."""

    field: str
    """That says which model."""
    option: str
    others: tuple[str, ...]
    """Further fields: options of what loads it."""


MADE = {
    "reward_model": Made("folder", "score", ("dtype", "batch_size")),
    "judge_model": Made("model", "ask", ("dtype", "batch_size", "max_tokens")),
}


def read(config, *, load: Mapping[str, Load] = {}) -> dict[str, rewards.Reward]:
    """Return the rewards of `config.rewards`, each `{name: weight}`, or a block of its options with a `weight`.

    The name is one of `rewards.REWARDS`, or any other where the block has a field `reward` that says what is meant: one of those too, or
    "FILE.py:NAME" or "MODULE:NAME", a function of the user's own.

    Args:
      config: of the run.
      load: what loads a model, by the names of `MADE`; without it the rewards are good for finding what is wrong with the config.

    Raises:
      ValueError: none is named, or one is unknown, has an option that it does not take, or lacks one.
    """
    blocks = {name: {"weight": block} if isinstance(block, (int, float)) else plain(block) for name, block in config.rewards.items()}
    if not blocks:
        raise ValueError("rewards: name at least one, as config.rewards.exact_match = 1.0 (its weight).")
    for block in blocks.values():
        block.pop("weight", None)
    chosen = {name: block.pop("reward", name) for name, block in blocks.items()}
    for name, block in blocks.items():
        if chosen[name] in MADE:
            _make(name, block, MADE[chosen[name]], load.get(chosen[name], _nobody))
        chosen[name] = _found(chosen[name], f"rewards.{name}.reward")
        if "correct" in block:  # a reward that says which answers are right
            block["correct"] = _found(block["correct"], f"rewards.{name}.correct")
    return rewards.build(chosen, blocks)


def weights(config) -> dict[str, float]:
    """Return how much each reward counts."""
    blocks = config.rewards.items()
    return {name: float(block if isinstance(block, (int, float)) else block.get("weight", 1.0)) for name, block in blocks}


def check_columns(config, prompts: Sequence[data.Prompt], *, field: str) -> None:
    """Refuse prompts of which no row has a column that a reward cannot do without; asked as they are read, before anything is sampled.

    Args:
      config: of the run.
      prompts: all of a data set.
      field: of the config, which names its sources.

    Raises:
      ValueError: names the reward, the column and the nearest ones.
    """
    known = {name for prompt in prompts for name, value in prompt.columns.items() if value is not None}
    sampled = {"completion_ids", *(["episode_rewards"] if environments.used(config) else [])}
    for name, reward in read(config).items():
        for column in rewards.needed(reward):
            if column not in known | sampled:
                raise ValueError(
                    f"rewards.{name}: it needs {column!r}, which no row of {field} has, and which is no option that it was given; "
                    f"nearest columns: {nearest(column, known)}."
                )


def _found(name: Any, field: str) -> Any:
    """Return what a name stands for; one of `REWARDS` stays a name, for `rewards.build` knows more of these."""
    if not isinstance(name, str) or name in rewards.REWARDS:
        return name
    return environments.found(name, rewards.REWARDS, field=field)


def _make(name: str, block: dict[str, Any], made: Made, load: Load) -> None:
    """Put the option of a block in the place of the fields that it is made of."""
    if made.field not in block and made.option not in block:
        raise ValueError(
            f'rewards.{name}: which model? Say it as config.rewards.{name} = ConfigDict({{"{made.field}": "…", "weight": 1.0}}).'
        )
    if made.field in block:
        model, options = block.pop(made.field), {other: block.pop(other) for other in made.others if other in block}
        block[made.option] = load(model, **options)


def _nobody(*_: Any, **__: Any) -> Callable[..., list[Any]]:
    return lambda *_: []
