"""Libraries that some rewards need and the default installation leaves out."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

EXTRAS = {"jsonschema": "json", "math_verify": "maths", "reasoning_gym": "reasoning"}
"""Module -> the extra of ftjax that installs it."""


def require(module: str) -> ModuleType:
    """Return an optional module, or say how to install it."""
    check(module)
    return importlib.import_module(module)


def check(module: str) -> None:
    """Raise `ImportError` if a module is not installed, without importing it."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"rewards: this one needs {module}, which is not installed: pip install 'ftjax[{EXTRAS[module]}]'.")
