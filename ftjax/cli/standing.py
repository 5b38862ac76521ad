"""How the members of a sweep stand: their losses, whether they still train, and which is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ftjax.checkpoint import improves
from ftjax.cli.late import add_to, values_of
from ftjax.cli.loop import EARLY
from ftjax.cli.members import Member
from ftjax.types import Mean

LOST = "not finite"
"""Why a member ended whose last `max_skipped_steps` steps changed nothing."""


@dataclasses.dataclass
class Standing:
    """What a sweep remembers of a member beside its state, so that a resumed one decides and reports as an uninterrupted one would."""

    best: float | None = None
    """The best value of `checkpoint.best_metric`; None before one is finite."""
    best_step: int = 0
    bad_evals: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0
    ended: str = ""
    """Why it trains no more, if so: `EARLY` or `LOST`."""
    steps: int = 0
    """Those it took."""
    train_loss: float = float("nan")
    """At the last report."""
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """`{metric: [total, weight]}` over the steps since then."""

    def step(self, means: Mapping[str, Mean]) -> None:
        """Take the metrics of a step, on the host."""
        self.steps += 1
        missed = bool(means["skipped"].total)
        self.skipped += missed
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if missed else 0
        add_to(self.sums, means)

    def report(self) -> dict[str, float]:
        """Return the means since the last report, and begin anew."""
        sums, self.sums = self.sums, {}
        values = values_of(sums)
        self.train_loss = values["loss"]
        return values

    def judge(self, value: float, *, step: int, metric: str, patience: int, most_skipped: int) -> bool:
        """Take the result of an evaluation; return whether it is the best yet. The member may have ended by it."""
        better = improves(value, self.best, metric)
        if better:
            self.best, self.best_step = value, step
        self.bad_evals = 0 if better else self.bad_evals + 1
        if self.skipped_in_a_row >= most_skipped > 0:
            self.ended = LOST
        elif self.bad_evals >= patience > 0:
            self.ended = EARLY
        return better


def leader(standings: Sequence[Standing], metric: str) -> int | None:
    """Return the index of the best member, the first of equals; None if none was evaluated yet with a finite result."""
    best = None
    for index, standing in enumerate(standings):
        if standing.best is not None and improves(standing.best, None if best is None else standings[best].best, metric):
            best = index
    return best


def table(members: Sequence[Member], standings: Sequence[Standing], metric: str) -> Table:
    """Return the table member → options → training loss → best value and its step → what it does."""
    best = leader(standings, metric)
    names = list(dict.fromkeys(name for member in members for name in member.options))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("member", *(name.rpartition(".")[2] for name in names), "training loss", f"best held-out {metric}", "at step"):
        shown.add_column(Text(name), justify="right")
    shown.add_column("")
    for index, (member, standing) in enumerate(zip(members, standings, strict=True)):
        value = "–" if standing.best is None else f"{standing.best:.4f}"
        options = (str(member.value(name)) for name in names)
        cells = (str(index), *options, f"{standing.train_loss:.4f}", value, str(standing.best_step))
        notes = [*(["best"] if index == best else []), *([f"{standing.ended} at step {standing.steps}"] if standing.ended else [])]
        shown.add_row(*map(Text, cells), Text(", ".join(notes)), style="bold" if index == best else None)
    return shown


def as_json(members: Sequence[Member], standings: Sequence[Standing], metric: str, *, reason: str) -> dict[str, Any]:
    """Return the result of a sweep as plain data: what `sweep.json` holds."""
    rows = [
        {
            "member": index,
            "options": dict(member.options),
            "best": standing.best,
            "best_step": standing.best_step,
            "train_loss": standing.train_loss if standing.train_loss == standing.train_loss else None,
            "steps": standing.steps,
            "skipped": standing.skipped,
            "ended": standing.ended or reason,
        }
        for index, (member, standing) in enumerate(zip(members, standings, strict=True))
    ]
    return {"metric": metric, "best": leader(standings, metric), "members": rows}
