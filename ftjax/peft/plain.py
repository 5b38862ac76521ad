"""Methods that PEFT has not, or not as ftjax has them, as the plain LoRA that computes the same: what goes into a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ftjax import tree
from ftjax.peft.delta_lora import factors as delta_lora
from ftjax.peft.lora import relative
from ftjax.peft.relora import factors as relora
from ftjax.peft.riding import by_leaf
from ftjax.types import Params, Plan

Factors = Callable[[Mapping[str, jax.Array], Mapping[str, Any]], dict[str, jax.Array]]
"""`(what is trained of a leaf, options) -> {"a": [..., i, n r], "b": [..., n r, o]}`, at the method's own scale."""

FACTORS: dict[str, Factors] = {"delta_lora": delta_lora, "relora": relora}


def plain(frozen: Params, trainable: Params, plans: Sequence[Plan]) -> tuple[Params, tuple[Plan, ...]]:
    """Return trainable tree and plans with these methods as plain LoRAs of the same scale, A and B beside what they are added to.

    A LoRA that started from the weights has rank 2r then, Delta-LoRA r or 2r, ReLoRA (restarts + 1) r.

    Raises:
      ValueError: where a LoRA started is not in the frozen tree.
    """
    joined = {}
    for name, row in {row.method: row for row in plans if row.method in trainable}.items():
        kind = row.known_as
        if kind == "lora" and "init" in row.options:
            if name not in frozen:
                raise ValueError(f"{name}: it started from the weights, and where is in the frozen tree: pass frozen=frozen.")
            joined |= relative(frozen, trainable, name)
        elif kind in FACTORS:
            leaves = by_leaf(tree.flatten(trainable[name]))
            made = {leaf: FACTORS[kind](fields, row.options) for leaf, fields in leaves.items()}
            flat = {f"{leaf}/{field}": array for leaf, fields in made.items() for field, array in fields.items()}
            joined[name] = tree.unflatten(flat)
    rows = (_widened(row, tree.flatten(joined[row.method])) if row.method in joined else row for row in plans)
    return {**trainable, **joined}, tuple(rows)


def _widened(row: Plan, flat: Mapping[str, jax.Array]) -> Plan:
    """Return the row with the rank that its arrays have, and the alpha that leaves the scale as it was."""
    times = flat[f"{row.paths[0]}/a"].shape[-1] // row.options["rank"]
    options = {name: value for name, value in row.options.items() if name != "init"}
    factor = times**0.5 if options["rslora"] else times
    return row._replace(options=options | {"rank": times * options["rank"], "alpha": factor * options["alpha"]})
