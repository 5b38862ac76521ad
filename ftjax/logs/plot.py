"""The loss curve as a picture: what happened in a run, at a glance."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

_INK, _FAINT, _TRAIN, _EVAL = "#22262e", "#c9ced8", "#3b6fd4", "#e2703a"


def loss_curve(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str, subtitle: str = "", metric: str = "loss") -> None:
    """Draw the loss, or another metric, over the steps of training and at its evaluations.

    Args:
      rows: as `writers.read_jsonl` returns them: `step` with `train/loss` or `eval/loss`.
      path: the PNG to write; anything etils can, such as `gs://bucket/run/loss.png`.
      title: what was trained.
      subtitle: a line under it, such as the exact match before and after.
      metric: what is drawn: "reward", say.

    Raises:
      ValueError: no row has the metric.
    """
    train, held_out = _series(rows, f"train/{metric}"), _series(rows, f"eval/{metric}")
    if not len(train) and not len(held_out):
        raise ValueError(f"plot: no row has a train/{metric} or eval/{metric}; was nothing logged?")
    figure, axes = _figure(title, subtitle)
    _plot_series(axes, train, held_out)
    if metric == "loss":
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylabel(metric, color=_INK)
    _write(figure, path)


def sweep_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    labels: Sequence[str],
    best: int | None,
    title: str,
    subtitle: str = "",
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
    """
    from matplotlib import colormaps

    figure, axes = _figure(title, subtitle)
    highest, handles = 0.0, []
    for index, color in enumerate(colormaps["viridis"](np.linspace(0, 0.9, len(labels)))):
        color, width = (_EVAL, 2.4) if index == best else (color, 1.2)
        train, held_out = _series(rows, f"train/loss/{index}"), _series(rows, f"eval/loss/{index}")
        highest = max([highest, *train[:1, 1], *held_out[:1, 1]])
        axes.plot(train[:, 0], smooth(train[:, 1]), color=color, linewidth=width / 2, alpha=0.5)
        handles += axes.plot(held_out[:, 0], held_out[:, 1], color=color, linewidth=width, marker="o", markersize=1.5 * width)
    axes.set_ylim(0, 1.1 * highest or None)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, labelcolor=_INK)
    _write(figure, path)


def _figure(title: str, subtitle: str) -> tuple[Any, Any]:
    """Return a figure and its axes."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(colors=_INK, length=0)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=26)
    axes.annotate(subtitle, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_INK)
    return figure, axes


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
