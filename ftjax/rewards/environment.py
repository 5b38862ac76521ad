"""What an environment gave for the turns of an episode (see `ftjax.rollout.environment`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion


def environment(
    prompts: Sequence[Any], completions: Sequence[Completion], *, episode_rewards: Sequence[float | None], **columns: Any
) -> list[float | None]:
    """Return the sum of what the environment gave for the turns of each episode; None where it gave nothing.

    Args:
      prompts: not looked at.
      completions: not looked at.
      episode_rewards: of each episode.
      **columns: not looked at.
    """
    return list(episode_rewards)
