"""The shipped environments and tools by name, for configs to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ftjax.rewards import sandbox
from ftjax.rollout.calculator import calculator
from ftjax.rollout.environment import Factory
from ftjax.rollout.higher_lower import HigherLower
from ftjax.rollout.python_tool import python
from ftjax.rollout.toolbox import Parser, Tool, hermes

ENVIRONMENTS: Mapping[str, Factory] = {"higher_lower": HigherLower}
TOOLS: Mapping[str, Tool] = {"calculator": calculator, "python": python}
PARSERS: Mapping[str, Parser] = {"hermes": hermes}

CHECKS: Mapping[str, Callable[[], None]] = {"python": sandbox.check}
"""What a tool needs of the machine: raises, saying how to get it, where it is not there."""
