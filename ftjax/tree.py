"""Parameter trees as slash paths: filters, selection, partition, and the answer to a misspelt name.

A path joins the keys with `/` and has no leading slash: `layers/self_attn/q_proj/kernel`. Layers are stacked, so no path holds a
layer index. A **filter** says which leaves a rule is about:

* a regular expression that must match the whole path (`re.fullmatch`): `r".*/(q|v)_proj/kernel"`;
* one of `NAMED`: `"all-linear"` is every matrix inside the layers, as PEFT names them (embedding and output head excluded);
* a list of module names, as PEFT writes them: `["q_proj", "mlp.down_proj"]`;
* a callable `path -> bool`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ftjax.types import Params

Filter = str | Sequence[str] | Callable[[str], bool]

ALL_LINEAR = r"layers/.*_proj/kernel"
"""Every linear layer of the trunk: attention and MLP projections."""
ATTENTION = r"layers/self_attn/[qkvo]_proj/kernel"
MLP = r"layers/mlp/.*_proj/kernel"
NORMS = r"(.*/)?[a-z_]*norm/scale"
EVERYTHING = r".*"

NAMED = {"all-linear": ALL_LINEAR, "attention": ATTENTION, "mlp": MLP, "norms": NORMS, "everything": EVERYTHING}
"""Filters that have a name."""


def flatten(tree: Params) -> dict[str, Any]:
    """Return `{path: leaf}` in sorted order; whatever is not a dict is a leaf, and so is a `Weight`."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for key in sorted(node):
                visit(f"{prefix}/{key}" if prefix else key, node[key])
        else:
            flat[prefix] = node

    visit("", tree)
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the nested dict with these paths; the inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"tree: {path!r} runs through a leaf")
        if name in node:
            raise ValueError(f"tree: {path!r} is both a leaf and a branch, or appears twice")
        node[name] = leaf
    return tree


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Return the most similar of `names`, quoted and joined: the end of an error message."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.0)
    return ", ".join(repr(n) for n in close) if close else "none"


def describe(filter: Filter) -> str:
    """Return the filter as the user would write it."""
    if isinstance(filter, str):
        return filter
    return getattr(filter, "__name__", repr(filter)) if callable(filter) else "[" + ", ".join(filter) + "]"


def predicate(filter: Filter) -> Callable[[str], bool]:
    """Return `path -> bool` for any form of filter."""
    if isinstance(filter, str):
        try:
            return _one_pattern(NAMED.get(filter, filter))
        except re.error as error:
            raise ValueError(f"filter {filter!r} is not a regular expression: {error}") from error
    if callable(filter):
        return filter
    names = "|".join(re.escape(name.replace(".", "/")) for name in filter)
    return _one_pattern(rf"(.*/)?({names})/(kernel|scale)")


def _one_pattern(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda path: compiled.fullmatch(path) is not None


def matches(tree: Params, filter: Filter, *, who: str, exclude: Filter | None = None) -> tuple[str, ...]:
    """Return the paths that `filter` selects and `exclude` does not.

    Args:
      tree: any parameter tree.
      filter: see the module's docstring.
      who: the caller, named in the error.
      exclude: paths to leave out; they need not be among those that `filter` selects.

    Raises:
      ValueError: nothing matched, nothing is left, or one name of a list matched nothing; the message lists the nearest paths.
    """
    paths = list(flatten(tree))
    if not isinstance(filter, str) and not callable(filter):
        for name in filter:
            if not any(map(predicate([name]), paths)):
                modules = sorted({part for path in paths for part in path.split("/")[:-1]})
                raise ValueError(f"{who}: no module is named {name!r}; nearest: {nearest(name, modules)}.")
    found = tuple(filter_paths(paths, filter))
    if not found:
        shown = describe(filter)
        hint = " Paths have no leading '/'." if shown.startswith("/") else ""
        raise ValueError(f"{who}: pattern {shown!r} matched no leaf; nearest: {nearest(shown, paths)}.{hint}")
    if exclude is not None:
        out = matches(tree, exclude, who=f"{who}.exclude")
        found = tuple(path for path in found if path not in out)
        if not found:
            raise ValueError(f"{who}: {describe(filter)!r} without {describe(exclude)!r} leaves nothing to train.")
    return found


def filter_paths(paths: Iterable[str], filter: Filter) -> list[str]:
    """Return those of `paths` that `filter` selects, perhaps none."""
    return [path for path in paths if predicate(filter)(path)]


def partition(tree: Params, paths: Iterable[str]) -> tuple[Params, Params]:
    """Return `(those leaves, the others)`; `combine` joins them again."""
    chosen, flat = set(paths), flatten(tree)
    return unflatten({p: x for p, x in flat.items() if p in chosen}), unflatten({p: x for p, x in flat.items() if p not in chosen})


def combine(*trees: Params) -> Params:
    """Return the union of trees that share no leaf."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"tree: two trees both hold {path!r}")
            flat[path] = leaf
    return unflatten(flat)


def replace(tree: Params, leaves: Mapping[str, Any]) -> Params:
    """Return `tree` with the leaves at these paths replaced; the others are the same objects."""
    flat = flatten(tree)
    unknown = set(leaves) - set(flat)
    if unknown:
        path = sorted(unknown)[0]
        raise ValueError(f"tree: there is no leaf {path!r} to replace; nearest: {nearest(path, flat)}.")
    return unflatten({**flat, **leaves})


def first_match(rules: Sequence[tuple[Filter, Any]], path: str) -> Any:
    """Return the value of the first rule whose filter matches `path`, or None."""
    return next((value for filter, value in rules if predicate(filter)(path)), None)


def size(tree: Any) -> int:
    """Return the number of scalars stored in the arrays of a tree (or of shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Return the number of bytes that the arrays of a tree (or of shapes) take."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
