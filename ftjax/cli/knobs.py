"""What would make a step fit: changes of a config, each planned again from shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax import quant, sharding
from ftjax.cli import build, footprint, footprint_sampling, objective, rollouts
from ftjax.cli.topology import Topology

_LEAST_TOKENS = 64
"""A row is not made shorter than this."""

Change = Mapping[str, Any]
"""`{field of the config: value}`."""


class Tried(NamedTuple):
    """A change, and what the step takes with it."""

    change: Change
    footprint: footprint.Footprint

    @property
    def flags(self) -> str:
        """The change on a command line."""
        return " ".join(f"--config.{name}={_shown(value)}" for name, value in self.change.items())


def tried(config: ConfigDict, topology: Topology, *, budget: int) -> list[Tried]:
    """Return for each knob the least change with which the step takes no more than `budget` bytes, or the most that it can give.

    Knobs that save nothing, or cannot be turned, are left out. Where none suffices, the last is those together that leave the rows and
    tokens of a step as they are.
    """
    before = footprint.of(config, build.mesh(config, topology.devices), topology.kind).peak
    found = [best for ladder in _ladders(config, topology) if (best := _turn(config, topology, ladder, budget)) is not None]
    found = sorted((one for one in found if one.footprint.peak < before), key=lambda one: one.footprint.peak)
    if any(one.footprint.peak <= budget for one in found):
        return found
    changes = {name: value for one in found for name, value in one.change.items() if name not in ("data.batch_size", "data.max_tokens")}
    together = _try(config, topology, changes) if len(changes) > 1 else None
    return [*found, together] if together is not None else found


def _ladders(config: ConfigDict, topology: Topology) -> Iterator[Sequence[Change]]:
    """Yield the changes of each knob, from the mildest on."""
    data, mesh = config.data, build.mesh(config, topology.devices)
    parts = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    rows, least = data.batch_size // parts, parts * data.accumulation
    if not objective.compares_rows(config):
        yield [{"data.accumulation": n} for n in range(data.accumulation + 1, rows + 1) if rows % n == 0]
    yield [{"data.batch_size": least * n} for n in range(data.batch_size // least - 1, 0, -1) if n & (n - 1) == 0]
    if rollouts.used(config):
        written = footprint_sampling.slots(config)
        yield [{"rollout.slots": written // n} for n in (2, 4, 8, 16) if written % (n * parts) == 0]
    yield [{"model.remat": name} for name in _after(("none", "elementwise", "full"), config.model.remat)]
    yield [{"data.max_tokens": data.max_tokens // n} for n in (2, 4, 8) if data.max_tokens // n >= _LEAST_TOKENS]
    dense = [name for name in config.methods if name not in quant.METHODS]
    packed = next((name for name in config.methods if name in quant.METHODS), "none")
    yield [{"methods": (name, *dense)} for name in _after(("none", "int8", "nf4"), packed)]
    most = len(topology.devices) // mesh.shape["tensor"] // mesh.shape["context"]
    yield [{"mesh.data": most // n, "mesh.fsdp": n} for n in range(mesh.shape["fsdp"] + 1, most + 1) if most % n == 0]


def _after(names: Sequence[str], name: str) -> Sequence[str]:
    """Return the names that come after one of them; none if it is not among them."""
    return names[names.index(name) + 1 :] if name in names else ()


def _turn(config: ConfigDict, topology: Topology, ladder: Sequence[Change], budget: int) -> Tried | None:
    """Return the first rung that fits, or the last that can be built."""
    last = None
    for change in ladder:
        last = _try(config, topology, change) or last
        if last is not None and last.footprint.peak <= budget:
            break
    return last


def _try(config: ConfigDict, topology: Topology, change: Change) -> Tried | None:
    """Return the footprint with a change; None where the config cannot be built with it, as a base that is trained cannot be packed."""
    with config.copy_and_resolve_references().unlocked() as other:
        other.update_from_flattened_dict(change)
    try:
        return Tried(change, footprint.of(other, build.mesh(other, topology.devices), topology.kind))
    except ValueError:
        return None


def _shown(value: Any) -> str:
    text = str(value).replace(" ", "")
    return f'"{text}"' if isinstance(value, tuple) else text
