"""Which matrices a format hurts most, and a rule that leaves the worst of them in more bits.

    rows = sensitivity.report(params, "nf4", nested=True, loss=loss, batches=batches)
    worst = sensitivity.worst(rows, share=0.1)
    method = peft.chain(quant.nf4(exclude=worst), quant.int8(worst), peft.lora())

Layers are stacked and one program serves all, so a rule chooses among kinds of matrix (paths), not among layers. The report has the error
of every layer of a kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax import tree
from ftjax.quant.quantize import quantize
from ftjax.types import Mean, Params

Loss = Callable[[Params, Any], Mean]
"""Of one batch, such as the negative log-likelihood of the tokens that a training predicts."""


class Row(NamedTuple):
    """What a format does to one kind of matrix."""

    path: str
    size: int
    """Numbers, of all layers."""
    errors: tuple[float, ...]
    """Of each layer: ‖D(W) - W‖ / ‖W‖, the relative root of the mean squared error."""
    rise: float | None
    """What the loss rises by when this kind alone is in the format; None where no loss was given."""

    @property
    def error(self) -> float:
        """The mean over the layers."""
        return math.fsum(self.errors) / len(self.errors)

    @property
    def harm(self) -> float:
        """What a bit more would gain: the rise of the loss for each number, else the error."""
        return self.error if self.rise is None else self.rise / self.size


def relative_errors(w: Float[Array, "*l i o"], found: Float[Array, "*l i o"]) -> Float[Array, "*l"]:
    """Return ‖found - w‖ / ‖w‖ of each matrix; 0 of one that is zero and stays so."""
    w, found = w.astype(jnp.float32), found.astype(jnp.float32)
    off, size = (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1))) for x in (found - w, w))
    return jnp.where(off == 0, 0.0, off / jnp.where(size == 0, 1.0, size))


def report(
    params: Params,
    format: str,
    *,
    targets: tree.Filter = "all-linear",
    group: int | None = 64,
    nested: bool = False,
    loss: Loss | None = None,
    batches: Iterable[Any] = (),
) -> list[Row]:
    """Return what a format does to each kind of matrix, the most harmed first.

    Args:
      params: the dense model.
      format: of `ftjax.quant.SPECS`, as the next three of `ftjax.quant.quantized`.
      targets: which matrices (see `ftjax.tree`).
      group: consecutive rows that share a scale; None: all.
      nested: quantise the scales too.
      loss: if given, it is measured once on the dense model and once for each kind: one program, and one dense copy of a kind at a time.
      batches: what it is measured on.

    Raises:
      ValueError: the filter matches nothing, the rows of a matrix do not divide into groups, or there is a loss and no batch.
    """
    flat, batches = tree.flatten(params), list(batches)
    if loss is not None and not batches:
        raise ValueError("sensitivity: there is a loss and no batch to measure it on.")
    evaluate = None if loss is None else jax.jit(loss)

    def measured(params: Params) -> float:
        return sum((evaluate(params, batch) for batch in batches[1:]), start=evaluate(params, batches[0])).value()

    @jax.jit
    def seen(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = quantize(w, format, group=group, nested=nested).materialize()
        return found, relative_errors(w, found)

    dense = None if loss is None else measured(params)
    rows = []
    for path in tree.matches(params, targets, who="sensitivity"):
        try:
            found, errors = seen(flat[path])
        except ValueError as error:
            raise ValueError(f"sensitivity: {path!r}: {error} Choose another group, or other targets.") from error
        rise = None if dense is None else measured(tree.replace(params, {path: found})) - dense
        rows.append(Row(path, flat[path].size, tuple(errors.reshape(-1).tolist()), rise))
    return sorted(rows, key=lambda row: row.harm, reverse=True)


def worst(rows: Sequence[Row], *, share: float = 0.1) -> str:
    """Return a filter of the kinds to leave in more bits: of those most harmed for their size, as many as fit into a share of all numbers.

    A kind that is too large for what is left of the share is passed over. A kind whose loss does not rise is never chosen.

    Raises:
      ValueError: none fits.
    """
    left, chosen = share * sum(row.size for row in rows), []
    for row in sorted(rows, key=lambda row: row.harm, reverse=True):
        if row.size <= left and row.harm > 0:
            chosen.append(row.path)
            left -= row.size
    if not chosen:
        smallest = min(row.size for row in rows) / sum(row.size for row in rows)
        raise ValueError(f"sensitivity: no kind that is harmed fits into {share:.3g} of the numbers; the smallest has {smallest:.3g}.")
    return "|".join(map(re.escape, chosen))
