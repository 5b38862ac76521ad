"""What a plan is for: described TPU chips, a GPU of so many gigabytes, or this machine; and who can compile for it."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import psutil
from jax.experimental import topologies

from ftjax.tree import nearest

HBM = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
"""GiB that a program may use of a device, by libtpu's own word; `tpu7x` has two devices a chip."""

EXAMPLES = (
    "here",
    "gpu:24GB",
    "gpu:48GB",
    "gpu:80GB",
    "gpu:8x80GB",
    "v5e:2x2",
    "v5e:4x4",
    "v5p:1x1x1",
    "v5p:2x2x1",
    "v6e:2x2",
    "tpu7x:2x2x1",
)
"""Names, to be nearest to."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_TPU_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8"}


class Topology(NamedTuple):
    """Some devices, real or described."""

    name: str
    devices: tuple[jax.Device, ...]
    """What programs are laid out for and compiled for: of a GPU that is not here, stand-ins."""
    memory: int
    """Bytes of a device."""
    kind: str
    """What it is: "cpu", "gpu" or "tpu"; decides which form of a computation runs."""
    described: str
    """In words."""
    stand_in: str = ""
    """What is compiled for in its place, if anything is."""


def find(name: str) -> Topology:
    """Return the topology of a name: `here`, `gpu:48GB`, `gpu:8x80GB`, or a TPU slice as `v5p:2x2x1`.

    Raises:
      ValueError: there is no such topology; the nearest names are listed.
      ImportError: a TPU slice is named and libtpu is not installed.
    """
    if name == "here":
        return _here()
    if match := re.fullmatch(r"gpu:(?:(\d+)x)?(\d+(?:\.\d+)?)GB", name, re.IGNORECASE):
        return _gpu(name, int(match[1] or 1), float(match[2]))
    chip, _, layout = name.partition(":")
    if chip in HBM and re.fullmatch(r"\d+(x\d+){1,2}", layout):
        return _tpu(name, chip, tuple(map(int, layout.split("x"))))
    raise ValueError(
        f"--topology: there is no {name!r}; nearest: {nearest(name, EXAMPLES)}. It is 'here', a GPU's memory as 'gpu:48GB' (several: "
        f"'gpu:8x80GB'), or a TPU slice as 'v5p:2x2x1' (chips: {', '.join(HBM)})."
    )


def prepare(name: str) -> None:
    """Keep JAX off this machine's accelerators where others are described, and let it show as many CPU devices as several GPUs need.

    To be called before its first use; later it does nothing.
    """
    if name == "here":
        return
    jax.config.update("jax_platforms", "cpu")
    if match := re.fullmatch(r"gpu:(\d+)x.*", name, re.IGNORECASE):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", int(match[1]))


def _here() -> Topology:
    devices = tuple(jax.devices())
    kind = devices[0].platform
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    if limit:
        return Topology("here", devices, limit, kind, f"this machine, {_count(devices)} with {limit / 2**30:.2f} GiB each")
    described = f"this machine: {host_memory() / 2**30:.1f} GiB of memory" + (f", shared by {len(devices)}" if len(devices) > 1 else "")
    return Topology("here", devices, host_memory() // len(devices), kind, described)


def host_memory() -> int:
    """Return the bytes that a process may use on this machine: the memory, or what a container is given of it."""
    files = (Path(path) for path in _LIMITS)
    limits = [int(text) for path in files if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([psutil.virtual_memory().total, *limits])


def _gpu(name: str, count: int, gigabytes: float) -> Topology:
    stand_in, devices = "a CPU", tuple(jax.devices("cpu"))
    if count == 1 and importlib.util.find_spec("libtpu"):
        stand_in, devices = "one v5p chip, which attends as a GPU does", _tpu("v5p:1x1x1", "v5p", (1, 1, 1)).devices
    if count > len(devices):
        raise ValueError(f"--topology: {name} needs {count} devices to stand for it, and JAX shows {len(devices)}.")
    described = f"{count} GPUs of {gigabytes:g} GiB each" if count > 1 else f"a GPU of {gigabytes:g} GiB"
    return Topology(name, devices[:count], int(gigabytes * 2**30), "gpu", described, stand_in)


def _tpu(name: str, chip: str, layout: tuple[int, ...]) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"--topology: {name} is compiled for by libtpu, which is not installed: `pip install libtpu`. It needs no TPU. Without it "
            f"--topology=gpu:{math.prod(layout)}x{HBM[chip]:.0f}GB estimates as many devices of that size."
        )
    for variable, value in _TPU_HOST.items():
        os.environ.setdefault(variable, value)
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # nothing runs; without this libtpu holds a lock file in the temporary folder
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(layout) == 1 else {}
    try:
        devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **one_chip).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology: libtpu has no {name!r} ({str(error).splitlines()[0]}); try {nearest(name, EXAMPLES)}.") from error
    return Topology(name, devices, int(HBM[chip] * 2**30), "tpu", f"{name}, {_count(devices)} with {HBM[chip]} GiB each")


def _count(devices: tuple[jax.Device, ...]) -> str:
    return f"{len(devices)} × {devices[0].device_kind}"
