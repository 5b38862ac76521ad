"""What multiplies the packed matrices of a model, which of them, and why nothing faster does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.quant import PackedWeight
from ftjax.quant.permuted import PermutedWeight
from ftjax.types import Params
from ftjax.weights import Leaf, Wrapper


def told(params: Params, mesh: Mesh, *, rows: int, dtype: Any) -> str:
    """Return which implementation multiplies how many packed matrices, by name where it is not one for all; nothing where none is packed.

    Args:
      params: of arrays or shapes, with adapters or without.
      mesh: that they are on, or will be.
      rows: of the activations on each device.
      dtype: of the activations.

    Raises:
      ValueError: a matrix asks for one that cannot; the message names it.
    """
    leaves = {path: bare(leaf) for path, leaf in tree.flatten(params).items()}
    packed = tree.unflatten({path: leaf for path, leaf in leaves.items() if isinstance(leaf, PackedWeight)})
    placed = sharding.leaves_on_mesh(packed, mesh) if mesh.size > 1 else packed
    platform = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform)
    found: dict[tuple[str, str], list[str]] = {}
    for path, leaf in tree.flatten(placed).items():
        try:
            name, passed = (leaf.base if isinstance(leaf, sharding.Sharded) else leaf).choice(rows, jnp.dtype(dtype), platform)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        reasons = "".join(f"\n  not by {other!r}: {reason}" for other, reason in passed.items())
        found.setdefault((name, reasons), []).append(path)
    return "\n".join(
        f"{len(paths)} packed matrices are multiplied by {name!r}{f': {joined(paths)}' if len(found) > 1 else ''}{reasons}"
        for (name, reasons), paths in found.items()
    )


def while_decoding(params: Params, *, rows: int, mesh: Mesh | None = None) -> str:
    """Return `told` of the steps of generation, in which each text is one row."""
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    said = told(params, mesh, rows=rows, dtype=params["embed_tokens"]["kernel"].dtype)
    return said and f"{said}\n  ({rows} row{'s' if rows > 1 else ''} at a time, while decoding)"


def joined(paths: Iterable[str]) -> str:
    """Return paths as few filters: those that differ in the module alone are one, `layers/mlp/(down_proj|up_proj)/kernel`."""
    modules: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        owner, _, rest = path.rpartition("/")[0].rpartition("/")
        modules.setdefault((owner and f"{owner}/", path.rpartition("/")[2]), []).append(rest)
    either = {place: names[0] if len(names) == 1 else f"({'|'.join(names)})" for place, names in modules.items()}
    return ", ".join(f"{owner}{names}/{leaf}" for (owner, leaf), names in either.items())


def bare(leaf: Leaf) -> Leaf:
    """Return the leaf without the adapters that ride on it, and without the order of its rows."""
    while isinstance(leaf, Wrapper | PermutedWeight):
        leaf = leaf.base
    return leaf
