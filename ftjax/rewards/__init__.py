"""Plain callables that judge text: prompts and completions in, numbers out."""

from ftjax.rewards.completion import Completion, Reward, Scores, text
from ftjax.rewards.endpoint import Endpoint, EndpointError
from ftjax.rewards.exact import exact_match
from ftjax.rewards.numeric import numeric_match
from ftjax.rewards.panel import Failure, Judged, RewardError, judge, needed
from ftjax.rewards.registry import REWARDS, build
from ftjax.rewards.sandbox import NoIsolation

__all__ = [
    "REWARDS",
    "Completion",
    "Endpoint",
    "EndpointError",
    "Failure",
    "Judged",
    "NoIsolation",
    "Reward",
    "RewardError",
    "Scores",
    "build",
    "exact_match",
    "judge",
    "needed",
    "numeric_match",
    "text",
]
