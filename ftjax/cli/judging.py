"""How the rewards of a config judge: what they are shown, and which process of a run asks about what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from ftjax import data, rewards
from ftjax.cli import panel, runtime
from ftjax.cli.config import plain
from ftjax.rollout import Sample

Judge = Callable[[Sequence[data.Prompt], Sequence[str], Sequence[Sample]], rewards.Judged]
"""`(prompts, texts, samples) -> judged`, one of each a sample."""


def judge(config, *, load: Mapping[str, panel.Load] = {}) -> Judge:
    """Return how the rewards of a config judge: see `panel.read` for the arguments and what is refused."""
    chosen, weights = panel.read(config, load=load), list(panel.weights(config).values())
    options = plain(config.judging)
    in_messages = options.pop("messages", False)

    def judged(prompts: Sequence[data.Prompt], texts: Sequence[str], samples: Sequence[Sample]) -> rewards.Judged:
        # What a reward needs and none of these rows has, others do: `panel.check_columns` has seen to it.
        absent = {name: [None] * len(prompts) for reward in chosen.values() for name in rewards.needed(reward)}
        shown = {**absent, **columns(prompts), "completion_ids": [sample.tokens[sample.drawn].tolist() for sample in samples]}
        if all(sample.episode for sample in samples):
            shown["episode_rewards"] = [sample.episode.reward for sample in samples]
        said = (lambda text: [{"role": "assistant", "content": text}]) if in_messages else (lambda text: text)
        completions = [list(sample.episode.messages) if sample.episode else said(text) for sample, text in zip(samples, texts, strict=True)]
        asked = [prompt.messages if in_messages else prompt.asked for prompt in prompts]
        try:
            failed = _failures(samples, asked, strict=options["on_error"] == "raise")
            found = rewards.judge(chosen, weights, asked, completions, shown, **options)
        except rewards.RewardError as error:
            raise ValueError(f"{error} In a config: judging.on_error='skip'.") from error
        without = partial(_without, rows=[failure.row for failure in failed])
        scores = {name: without(values) for name, values in found.scores.items()}
        return rewards.Judged(scores, without(found.rewards), (*failed, *found.failures))

    return judged


def divided(
    judge: Judge, prompts: Sequence[data.Prompt], texts: Sequence[str], samples: Sequence[Sample], *, per_prompt: int
) -> rewards.Judged:
    """Return what a judge says of all samples, which every process of a run has; each asks about its part, and all hear of every part.

    The samples of a prompt stay together, for a reward may compare them.

    Raises:
      ValueError: the judge raised, in whichever process; it is raised in all of them, so that none waits for another.
    """
    if jax.process_count() == 1:
        return judge(prompts, texts, samples)
    mine = share(len(prompts) // per_prompt, jax.process_index(), jax.process_count(), per_prompt=per_prompt)
    parts = runtime.gathered(_heard(partial(judge, prompts[mine], texts[mine], samples[mine]), mine))
    if errors := [f"in process {process}: {part['error']}" for process, part in enumerate(parts) if "error" in part]:
        raise ValueError(errors[0])
    known = [part for part in parts if part]
    scores = {name: np.concatenate([part["scores"][name] for part in known]) for name in known[0]["scores"]}
    failures = tuple(rewards.Failure(*failure) for part in known for failure in part["failures"])
    return rewards.Judged(scores, np.concatenate([part["rewards"] for part in known]), failures)


def share(prompts: int, index: int, count: int, *, per_prompt: int) -> slice:
    """Return which of the rows of so many prompts are those of part `index` of `count`: whole prompts, as evenly as they divide.

    >>> [share(3, index, 2, per_prompt=4) for index in range(2)]
    [slice(0, 4, None), slice(4, 12, None)]
    """
    return slice(prompts * index // count * per_prompt, prompts * (index + 1) // count * per_prompt)


def _heard(judge: Callable[[], rewards.Judged], mine: slice) -> dict[str, Any]:
    """Return what a judge says as plain data; nothing of no samples."""
    if mine.start == mine.stop:
        return {}
    try:
        judged = judge()
    except Exception as error:  # for the others to hear; they wait
        return {"error": str(error) if isinstance(error, ValueError) else repr(error)}
    failures = [failure._replace(row=failure.row + mine.start) for failure in judged.failures]
    return {"scores": {name: x.tolist() for name, x in judged.scores.items()}, "rewards": judged.rewards.tolist(), "failures": failures}


def _failures(samples: Sequence[Sample], asked: Sequence[Any], *, strict: bool) -> list[rewards.Failure]:
    """Return the episodes that ended because their environment failed, of which nothing is learnt; if it must not, raise `RewardError`."""
    failed = [(row, sample.episode.failure) for row, sample in enumerate(samples) if sample.episode and sample.episode.failure]
    found = [rewards.Failure("environment", row, asked[row], f"ended an episode by {failure}") for row, failure in failed]
    if found and strict:
        raise rewards.RewardError(f"{found[0]} ({len(found)} in all).")
    return found


def _without(values: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Return what samples are worth, which is nothing known for some rows: NaN."""
    found = np.array(values)
    found[list(rows)] = np.nan
    return found


def columns(prompts: Sequence[data.Prompt]) -> Mapping[str, list[Any]]:
    """Return the columns of the prompts' rows, but for what a reward has arguments of its own for."""
    rows = [prompt.columns for prompt in prompts]
    names = sorted({name for row in rows for name in row} - {"prompt", "prompts", "completion", "completions"})
    return {name: [row.get(name) for row in rows] for name in names}


def as_rows(judged: rewards.Judged, shape: tuple[int, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the weighted sums and each reward, float32 of a shape."""
    each = {name: scores.reshape(shape).astype(np.float32) for name, scores in judged.scores.items()}
    return judged.rewards.reshape(shape).astype(np.float32), each
