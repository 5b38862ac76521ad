"""Plain callables that judge text: prompts and completions in, numbers out."""

from ftjax.rewards.exact import exact_match
from ftjax.rewards.numeric import numeric_match

__all__ = ["exact_match", "numeric_match"]
