"""The loss curve as a picture, with rewards and the patterns that were pointed out: what happened in a run, at a glance."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

_INK, _FAINT, _TRAIN, _EVAL, _ADVICE = "#22262e", "#c9ced8", "#3b6fd4", "#e2703a", "#7a5cc0"


_REWARDS = {"chosen": "#2a9d6f", "desirable": "#2a9d6f", "rejected": "#c2405a", "undesirable": "#c2405a", "margin": _INK}
"""What the second panel draws of `train/rewards/…`, and in which colour."""
ADVICE = "advice/"
"""What the name of a text begins with that says what a pattern in the metrics means."""


def loss_curve(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str, subtitle: str = "", metric: str = "loss", unit: str = ""
) -> None:
    """Draw the loss, or another metric, over the steps of training and at its evaluations.

    Where responses have been compared a second panel has their rewards and the margin. A dotted line stands at each step at which a
    pattern was pointed out, with its name.

    Args:
      rows: as `writers.read_jsonl` returns them: `step` with `train/loss`, `eval/loss`, `train/rewards/chosen` and so on, or `advice/NAME`.
      path: the PNG to write; anything etils can, such as `gs://bucket/run/loss.png`.
      title: what was trained.
      subtitle: a line under it, such as the exact match before and after.
      metric: what is drawn: "reward", say.
      unit: of it, such as "nats per token"; "" where it has none.

    Raises:
      ValueError: no row has the metric.
    """
    train, held_out = _series(rows, f"train/{metric}"), _series(rows, f"eval/{metric}")
    if not len(train) and not len(held_out):
        raise ValueError(f"plot: no row has a train/{metric} or eval/{metric}; was nothing logged?")
    rewards = {name: line for name in _REWARDS if len(line := _series(rows, f"train/rewards/{name}"))}
    figure, panels = _figure(title, subtitle, panels=2 if rewards else 1)
    _plot_series(panels[0], train, held_out)
    panels[0].set_ylabel(f"{metric} ({unit})" if unit else metric, color=_INK)
    if metric == "loss" and min(train[:, 1].min(initial=0), held_out[:, 1].min(initial=0)) >= 0:
        panels[0].set_ylim(bottom=0)
    if rewards:
        _plot_rewards(panels[1], rewards)
    _mark(panels, rows)
    _write(figure, path)


def sweep_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    labels: Sequence[str],
    best: int | None,
    title: str,
    subtitle: str = "",
    unit: str = "",
) -> None:
    """Draw the losses of the members of a sweep over the steps: held out with dots, training without, the best one in orange.

    What rises far above the losses at the beginning leaves the picture.

    Args:
      rows: as `writers.read_jsonl` returns them: `step` with `train/loss/0`, `eval/loss/0` and so on.
      path: as in `loss_curve`.
      labels: what the legend calls the members, in their order.
      best: the index of the best.
      title: what was trained.
      subtitle: a line under it.
      unit: of the loss, as in `loss_curve`.
    """
    from matplotlib import colormaps

    figure, (axes,) = _figure(title, subtitle)
    axes.set_ylabel(f"loss ({unit})" if unit else "loss", color=_INK)
    highest, lowest, handles = 0.0, 0.0, []
    for index, color in enumerate(colormaps["viridis"](np.linspace(0, 0.9, len(labels)))):
        color, width = (_EVAL, 2.4) if index == best else (color, 1.2)
        train, held_out = _series(rows, f"train/loss/{index}"), _series(rows, f"eval/loss/{index}")
        highest = max([highest, *train[:1, 1], *held_out[:1, 1]])
        lowest = min([lowest, *train[:, 1], *held_out[:, 1]])
        axes.plot(train[:, 0], smooth(train[:, 1]), color=color, linewidth=width / 2, alpha=0.5)
        handles += axes.plot(held_out[:, 0], held_out[:, 1], color=color, linewidth=width, marker="o", markersize=1.5 * width)
    axes.set_ylim(1.1 * lowest, 1.1 * highest or None)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, labelcolor=_INK)
    _write(figure, path)


def _figure(title: str, subtitle: str, *, panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, one below the other over the same steps."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7.2, 1.4 + 2.8 * panels), dpi=160, layout="constrained", facecolor="white")
    found = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for axes in found:
        axes.grid(axis="y", color=_FAINT, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(colors=_INK, length=0)
    found[-1].set_xlabel("step", color=_INK)
    found[0].set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=26)
    found[0].annotate(subtitle, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_INK)
    return figure, found


def _write(figure, path: str | os.PathLike) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    epath.Path(path).write_bytes(picture.getvalue())


def _plot_series(axes, train: np.ndarray, held_out: np.ndarray) -> None:
    ends = {}
    if len(train):
        axes.plot(train[:, 0], train[:, 1], color=_TRAIN, alpha=0.25, linewidth=1)
        axes.plot(train[:, 0], smooth(train[:, 1]), color=_TRAIN, linewidth=2)
        ends["training"] = (train[-1, 0], smooth(train[:, 1])[-1], _TRAIN)
    if len(held_out):
        axes.plot(held_out[:, 0], held_out[:, 1], color=_EVAL, linewidth=1.6, marker="o", markersize=4)
        ends["held out"] = (held_out[-1, 0], held_out[-1, 1], _EVAL)
    highest = max(ends, key=lambda name: ends[name][1])
    for name, (x, y, color) in ends.items():
        _label(axes, x, y, name, color, offset=9 if name == highest else -14)


def _plot_rewards(axes, rewards: Mapping[str, np.ndarray]) -> None:
    """Draw what responses are worth to the model, each line named in its colour by the legend: their ends may lie close together."""
    for name, line in rewards.items():
        axes.plot(line[:, 0], line[:, 1], color=_REWARDS[name], alpha=0.25, linewidth=1)
        axes.plot(line[:, 0], smooth(line[:, 1]), color=_REWARDS[name], linewidth=2, label=f"{name} {smooth(line[:, 1])[-1]:.3g}")
    axes.axhline(0, color=_FAINT, linewidth=0.8)
    axes.set_ylabel("reward", color=_INK)
    axes.legend(loc="best", frameon=False, fontsize=9, labelcolor="linecolor", handlelength=0)


def _mark(panels: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line through all panels at each step at which a pattern was pointed out, and write its name beside it."""
    found: dict[int, list[str]] = {}
    for row in rows:
        names = [name.removeprefix(ADVICE).replace("_", " ") for name in row if name.startswith(ADVICE)]
        found.setdefault(row["step"], []).extend(names)
    for step, names in found.items():
        for axes in panels if names else ():
            axes.axvline(step, color=_ADVICE, linewidth=1, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 7}
        panels[0].annotate("\n".join(names), (step, 0), (-3, 3), rotation=90, color=_ADVICE, **place)


def _label(axes, x: float, y: float, text: str, color: str, *, offset: int) -> None:
    """Name a line at its end, in its colour: no legend to look up."""
    axes.annotate(
        f"{text} {y:.3f}", (x, y), (-4, offset), textcoords="offset points", ha="right", color=color, fontsize=9, fontweight="bold"
    )


def smooth(values: np.ndarray, *, window: int = 9) -> np.ndarray:
    """Return a moving average over at most `window` values, shorter at the ends, so that it neither lags nor shrinks."""
    half = min(window, max(1, len(values) // 5)) // 2
    return np.array(
        [
            np.mean(values[max(0, i - min(half, i, len(values) - 1 - i)) : i + min(half, i, len(values) - 1 - i) + 1])
            for i in range(len(values))
        ]
    )


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float).reshape(-1, 2)
