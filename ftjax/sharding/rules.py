"""Rules from paths to partition specs, and a report of what they did.

A rule is `(regex, PartitionSpec)`; the whole path must match and the first match wins, as everywhere in ftjax. Arrays inside a `Weight`
have paths of their own (`…/kernel/a`). An axis of an array that its mesh axes do not divide is replicated instead, and the report says so.
Rows of a packed matrix that share a scale stay on one device: it is the groups that must divide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax import tree
from ftjax.quant import QuantizedWeight
from ftjax.types import TrainState

Rules = Sequence[tuple[str, P]]

_COLUMN = r"(.*/)?layers/(.*/)?(q|k|v|gate|up)_proj"
_ROW = r"(.*/)?layers/(.*/)?(o|down)_proj"
_MATRIX = r"kernel(/base)*(/codes|/scales|/zeros)?"  # dense or packed
_NESTED = r"kernel(/base)*/scales/codes"  # [o, n]
RULES: Rules = (
    (rf"{_COLUMN}/{_MATRIX}", P(None, "fsdp", "tensor")),
    (rf"{_COLUMN}/{_NESTED}", P(None, "tensor", "fsdp")),
    (rf"{_COLUMN}/kernel/(start_|past_)?a[12]?", P(None, "fsdp", None)),
    (rf"{_COLUMN}/kernel/(start_|past_)?b[12]?", P(None, None, "tensor")),
    (rf"{_COLUMN}/bias", P(None, "tensor")),
    (rf"{_ROW}/{_MATRIX}", P(None, "tensor", "fsdp")),
    (rf"{_ROW}/{_NESTED}", P(None, "fsdp", "tensor")),
    (rf"{_ROW}/kernel/(start_|past_)?a[12]?", P(None, "tensor", None)),
    (rf"{_ROW}/kernel/(start_|past_)?b[12]?", P(None, None, "fsdp")),
    (rf"{_ROW}/bias", P()),
    (rf"(.*/)?embed_tokens/{_MATRIX}", P("tensor", "fsdp")),
    (rf"(.*/)?embed_tokens/{_NESTED}", P("fsdp", "tensor")),
    (r"(.*/)?embed_tokens/kernel/(start_|past_)?a[12]?", P("tensor", None)),
    (r"(.*/)?embed_tokens/kernel/(start_|past_)?b[12]?", P(None, "fsdp")),
    (rf"(.*/)?lm_head/{_MATRIX}", P("fsdp", "tensor")),
    (rf"(.*/)?lm_head/{_NESTED}", P("tensor", "fsdp")),
    (r"(.*/)?lm_head/kernel/(start_|past_)?a[12]?", P("fsdp", None)),
    (r"(.*/)?lm_head/kernel/(start_|past_)?b[12]?", P(None, "tensor")),
    (r"(.*/)?kernel(/base)*/(order|scales/(scales|mean))", P()),  # of rows; of nested scales, one for 256 groups
    (r"(.*/)?[a-z_]*norm/scale", P()),
    (r"(.*/)?kernel/(magnitude|inputs|outputs|lambda_[a-z]+|w[12](_[ab])?|blocks?|values|places|lambdas|gammas|skew|rows|e|ratio)", P()),
    (r"(.*/)?layers/.*/down", P(None, "fsdp", None)),
    (r"(.*/)?layers/.*/up", P(None, None, "fsdp")),
    (r"(.*/)?layers/.*/(down|up)_bias", P()),
    (r"layers/slots/(mlp|self_attn)/[^/]+", P(None, "fsdp", None)),  # what runs beside a module
    (r"(.*/)?(prompt|layers/slots/prefix)/[a-z0-9]+", P()),  # virtual tokens
    (r"(.*/)?value_head/(kernel|bias)", P()),
    (r"([0-9]+/)?[a-z0-9_]+/[ab]", P()),  # a method's own arrays, one for all leaves
)
"""For a stacked decoder `[L, i, o]`: q, k, v, gate and up are split by column, o and down by row (Shoeybi et al., 2019, arXiv 1909.08053,
section 3), adapters as the matrix they ride on, codes and scales as the matrix that they stand for. The prefix lets one rule speak for a
leaf, its trained copy and its moments."""

REST: Rules = ((r".*", P()),)
"""Replicates what no rule before it matched: `(*mine, *REST)`."""


class Placed(NamedTuple):
    """Where one array goes, and why."""

    path: str
    rule: str
    rule_spec: P
    spec: P
    """What is left of the rule's spec where the mesh does not divide the array."""
    dropped: tuple[str, ...]
    """What is gone, in words."""
    leaf: Any
    """The array, or its shape and dtype."""


def placed(shapes: Any, mesh: Mesh, rules: Rules = RULES, *, strict: bool = False) -> list[Placed]:
    """Return where each array of a tree goes, in the order of `jax.tree.leaves`; scalars need no rule.

    Raises:
      ValueError: an array has no rule; a rule has more entries than its array has axes, or names an axis that the mesh has not; with
        `strict`, a dimension does not divide. The message lists all of them.
    """
    found, homeless, problems = [], [], []
    for (path, leaf), units in zip(paths(shapes), divisible(shapes), strict=True):
        rule = next((rule for rule in rules if tree.predicate(rule[0])(path)), None) if leaf.ndim else ("scalar", P())
        if rule is None:
            homeless.append(path)
        elif len(rule[1]) > leaf.ndim:
            problems.append(f"{path!r} {list(leaf.shape)} has fewer axes than its rule {rule[0]!r}: {rule[1]}")
        elif unknown := [name for entry in rule[1] for name in names(entry) if name not in mesh.shape]:
            problems.append(f"rule {rule[0]!r} names the axis {unknown[0]!r}; nearest: {tree.nearest(unknown[0], mesh.axis_names)}")
        else:
            spec, dropped = fit(rule[1], units, mesh)
            found.append(Placed(path, rule[0], rule[1], spec, dropped, leaf))
            problems += [f"{path!r} {list(leaf.shape)}: {what}" for what in dropped if strict]
    covered = [row.path for row in found]
    problems += [f"{path!r} has no rule; nearest path with one: {tree.nearest(path, covered, 1)}" for path in homeless]
    if problems:
        listing = "\n  ".join(problems)
        hint = "A rule is (regex, PartitionSpec); sharding.REST after your own replicates what they leave." if homeless else ""
        raise ValueError(f"sharding: the rules do not fit ({len(problems)} problems):\n  {listing}\n{hint}".rstrip())
    return found


def fit(spec: P, shape: Sequence[int], mesh: Mesh) -> tuple[P, tuple[str, ...]]:
    """Return the spec without the entries whose mesh axes do not divide their dimension, and those entries in words."""
    entries, dropped = [], []
    for axis, (entry, size) in enumerate(zip(spec, shape, strict=False)):
        parts = math.prod(mesh.shape[name] for name in names(entry))
        if size % parts and size > 1:
            dropped.append(f"axis {axis} of {size} is not divisible by {'*'.join(names(entry))}={parts}")
        entries.append(None if size % parts else entry)
    return P(*entries), tuple(dropped)


def shardings(shapes: Any, mesh: Mesh, rules: Rules = RULES, *, strict: bool = False) -> Any:
    """Return the tree of `NamedSharding`s for a tree of arrays or shapes; see `placed` for what it raises."""
    specs = [row.spec for row in placed(shapes, mesh, rules, strict=strict)]
    return jax.tree.unflatten(jax.tree.structure(shapes), [NamedSharding(mesh, spec) for spec in specs])


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = RULES, *, strict: bool = False) -> TrainState:
    """Return the shardings of a training state (or its shapes), for `make_train_step` and for a restore on another mesh.

    An array of the optimiser, or that the objective carries, lies as the trained leaf whose path its own ends with, if both have one shape
    (moments do); whatever else they keep (counts, factored moments) is small and replicated.
    """
    trainable = shardings(state.trainable, mesh, rules, strict=strict)
    everywhere = NamedSharding(mesh, P())
    known = {path: (leaf.shape, where) for (path, leaf), where in zip(paths(state.trainable), jax.tree.leaves(trainable), strict=True)}

    def mirror(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        twin = next((known[end] for n in range(len(parts)) if (end := "/".join(parts[n:])) in known), None)
        return twin[1] if twin is not None and twin[0] == leaf.shape else everywhere

    others = (jax.tree.unflatten(jax.tree.structure(x), [mirror(*one) for one in paths(x)]) for x in (state.opt_state, state.carried))
    return TrainState(everywhere, everywhere, trainable, *others)


class Row(NamedTuple):
    """What one rule did to a tree: a line of the printed table."""

    rule: str
    spec: P
    leaves: int
    parameters: int
    device_bytes: int
    """On each device."""
    dropped: tuple[str, ...]
    """`path: axis …` for each part of the rule that did not divide its array and is replicated instead."""


def report(shapes: Any, mesh: Mesh, rules: Rules = RULES) -> list[Row]:
    """Return a row for each rule that matched something, in the order of the rules."""
    groups: dict[tuple[str, P], list[Placed]] = {}
    for row in placed(shapes, mesh, rules):
        groups.setdefault((row.rule, row.rule_spec), []).append(row)
    order = [rule for rule, _ in rules]
    rows = [
        Row(
            rule,
            spec,
            len(group),
            sum(math.prod(row.leaf.shape) for row in group),
            sum(math.prod(NamedSharding(mesh, row.spec).shard_shape(row.leaf.shape)) * row.leaf.dtype.itemsize for row in group),
            tuple(f"{row.path}: {what}" for row in group for what in row.dropped),
        )
        for (rule, spec), group in groups.items()
    ]
    return sorted(rows, key=lambda row: order.index(row.rule) if row.rule in order else len(order))


def paths(arrays: Any) -> list[tuple[str, Any]]:
    """Return `(path, array)` for every array of a pytree, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def divisible(arrays: Any) -> list[tuple[int, ...]]:
    """Return the shape of each array in what a mesh may part, in the order of `jax.tree.leaves`: codes in groups, not in rows."""
    leaves = jax.tree.leaves(arrays, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    return [shape for leaf in leaves for shape in (_of_groups(leaf) if isinstance(leaf, QuantizedWeight) else [leaf.shape])]


def _of_groups(leaf: QuantizedWeight) -> list[tuple[int, ...]]:
    codes, *rest = (x.shape for x in jax.tree.leaves(leaf))
    groups = leaf.shape[-2] // leaf.group
    return [codes if groups == 1 else (*codes[:-2], groups, codes[-1]), *rest]  # one scale for all rows is at home anywhere


def names(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
