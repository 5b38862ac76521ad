"""Fold an adapter into its model and write the result as a Hugging Face folder.

  ftjax merge --model=… --adapter=DIR --output=DIR

It is `ftjax export` where an adapter (or the workdir of a run) must be named.
"""

from __future__ import annotations

from absl import flags as absl_flags

from ftjax.cli import export
from ftjax.cli.export import define_flags

__all__ = ["define_flags", "main"]


def main(flags: absl_flags.FlagValues) -> None:
    """Merge."""
    if not flags.adapter and not flags.workdir:
        raise ValueError("merge: name what to fold in: --adapter=FOLDER or --workdir=RUN. `ftjax export` writes a model as it is.")
    export.main(flags)
