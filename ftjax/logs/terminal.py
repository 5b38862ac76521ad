"""The run on the terminal: a table of what is trained, a progress bar, and plain lines where nobody watches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ftjax import quant, tree
from ftjax.types import Params, Plan
from ftjax.weights import Leaf


def plan_table(plan: Sequence[Plan], params: Params, trainable: Params) -> Table:
    """Return the table rule -> leaves -> parameters -> bytes: what each method does to which leaves, and what it trains.

    Of what is stored in fewer bits it says in how many, and the bytes before and after.
    """
    flat = tree.flatten(params)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for name, justify in (
        ("method", "left"),
        ("rule", "left"),
        ("options", "left"),
        ("leaves", "right"),
        ("trained", "right"),
        ("size", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")
    covered: set[str] = set()
    for row in plan:
        trained = tree.flatten(trainable.get(row.method, {}))
        alone = sum(other.method == row.method for other in plan) == 1
        mine = [leaf for path, leaf in trained.items() if alone or any(path == one or path.startswith(f"{one}/") for one in row.paths)]
        covered |= set(row.paths)
        options, size = dict(row.options), megabytes(tree.num_bytes(mine))
        if row.kind in quant.SPECS:
            bits, size = _stored([flat[path] for path in row.paths])
            options["bits"] = bits
        shown = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items() if value
        )
        named = (Text(part) for part in (row.method, row.rule, shown))  # `[q_proj]` is no markup
        table.add_row(*named, str(len(row.paths)), f"{tree.size(mine):,}", size)
    rest = [leaf for path, leaf in flat.items() if path not in covered]
    table.add_row(Text("frozen", "dim"), Text("whatever no rule names", "dim"), "", str(len(rest)), Text("0", "dim"), megabytes(0))
    total, base = tree.size(trainable), parameters(params)
    table.add_section()
    table.add_row(
        Text("all", "bold"),
        f"of {base:,} parameters ({megabytes(tree.num_bytes(params))})",
        f"{100 * total / base:.2f} %",
        str(len(flat)),
        Text(f"{total:,}", "bold"),
        megabytes(tree.num_bytes(trainable)),
    )
    return table


def parameters(params: Params) -> int:
    """Return the number of parameters of a tree: of a packed matrix those that it stands for."""
    return sum(math.prod(leaf.shape) for leaf in tree.flatten(params).values())


def _stored(leaves: Sequence[Leaf]) -> tuple[float, str]:
    """Return the bits of a number of packed matrices, scales and all, and the bytes before and after in words."""
    numbers, after = sum(math.prod(leaf.shape) for leaf in leaves), tree.num_bytes(leaves)
    before = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return round(8 * after / numbers, 3), f"{megabytes(before)} → {megabytes(after)}"


def megabytes(count: float) -> str:
    """Return a number of bytes as people write it: `9.8 MB`, `1.08 GB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


SHOWN = {
    "rewards/accuracy": "right {:.0%}",
    "accuracy": "right {:.0%}",
    "rewards/margin": "margin {:.3g}",
    "reward": "reward {:.3f}",
    "length": "{:.0f} tokens long",
}
"""What a line of progress says of pairs, of labelled responses and of rollouts, by metric."""


def told(texts: Mapping[str, str], values: Mapping[str, float]) -> dict[str, str]:
    """Return `{metric: text}` with the values in it, of those that there are; an accuracy of mere tokens is left out."""
    judged = "rewards/desirable" in values or "accuracy/wrong" in values
    return {name: text.format(values[name]) for name, text in texts.items() if name in values and (judged or name != "accuracy")}


class Terminal:
    """Progress and messages. Where the output is no terminal the bar becomes one plain line at each report.

    Args:
      quiet: say nothing (every process but the first).
      console: where to; the standard output if None.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, 120)
        self._progress: Progress | None = None
        self._task = None
        self._total, self._began, self._first_step = 0, 0.0, 0

    def say(self, *what, markup: bool = False, **options) -> None:
        """Print above the bar; texts as they are, unless `markup` says that their [brackets] are rich's."""
        self.console.print(*what, markup=markup, emoji=False, **options)

    def heading(self, text: str) -> None:
        """Print a heading between the parts of a run."""
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def panel(self, text: str, title: str) -> None:
        """Print a text in a frame."""
        self.console.print(Panel(Text(text), title=Text(title), title_align="left", box=box.ROUNDED, border_style="dim"))

    def start(self, total: int, *, done: int = 0) -> None:
        """Begin the bar of `total` steps, `done` of which an earlier process made."""
        self._total, self._began, self._first_step = total, time.monotonic(), done
        if not self.console.is_terminal or self.console.quiet:
            return
        self._progress = Progress(
            BarColumn(bar_width=28, complete_style="blue", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
        )
        self._task = self._progress.add_task("", total=total, completed=done, report="compiling …")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show loss, tokens a second and memory, of pairs and labels how many are right, of rollouts what they are worth."""
        more = "".join(f"{text}  " for text in told(SHOWN, values).values())
        speed = f"{values['tokens_per_second']:,.0f} tokens/s  {values['memory_gb']:.2f} GB"
        self.progress(step, f"loss {values['loss']:.4f}  {more}{speed}")

    def progress(self, step: int, shown: str) -> None:
        """Show a text of a step: beside the bar, or as a line."""
        if self._progress:
            self._progress.update(self._task, completed=step, report=shown)
        elif not self.console.quiet:
            self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {shown}  {self._left(step)} left")

    def stop(self) -> None:
        """End the bar."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._began) / max(1, step - self._first_step) * (self._total - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
