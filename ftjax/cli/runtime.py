"""What every sub-command that computes does first: the compile cache, the other processes, and a quiet log."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from ftjax import hub

_COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Define the flags that all of them share."""
    absl_flags.DEFINE_string(
        "compile_cache", "", "folder for compiled programs, 'off' for none (default: $JAX_COMPILATION_CACHE_DIR or the user's cache)", flags
    )
    absl_flags.DEFINE_bool(
        "distributed", False, "join the other processes (alone on a TPU pod; else $JAX_COORDINATOR_ADDRESS and the like are read)", flags
    )


def start(flags: absl_flags.FlagValues) -> None:
    """Set JAX up; to be called before its first use."""
    import jax

    logging.getLogger("absl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")
    set_compile_cache(flags.compile_cache)
    if flags.distributed or any(name in os.environ for name in _COORDINATOR):
        join_processes()
    if jax.default_backend() == "cpu":
        keep_memory()
    # A host array that slips into a jitted call would be copied at every step without a word.
    jax.config.update("jax_numpy_rank_promotion", "raise")


def local_path(flag: str, value: str) -> Path:
    """Return the path that a flag names; one on an object store is refused, as what reads or writes it there needs a local one."""
    if "://" in value:
        raise ValueError(f"--{flag}: {value} is not on this machine; a local path is needed (copy from or to the store yourself).")
    return Path(value).expanduser()


def json_object(flag: str, value: str) -> dict[str, Any]:
    """Return the object that a flag holds as JSON; an empty one for an empty text."""
    try:
        found = json.loads(value or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--{flag}: a JSON object is expected, not {value!r}.")
    return found


def set_compile_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, in a folder of ftjax's cache if empty, or nowhere if "off".

    The folder is made readable by this user alone: a program in it is run as it is.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", folder != "off")
    if folder == "off":
        return
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(hub.default_cache() / "compiled")
    if "://" not in chosen:
        Path(chosen).expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", chosen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_memory() -> None:
    """Let glibc keep the memory that a step frees for the next one.

    XLA on a CPU asks for all of a step's temporaries and frees them after it; given back to the kernel, every page is zeroed again at
    each step, which takes 4 % (float32) to 8 % (bfloat16) of a LoRA step of SmolLM2-135M. Elsewhere than on glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def join_processes() -> None:
    """Connect to the other processes of the run.

    On a TPU pod, under Slurm and under Open MPI JAX finds them by itself; elsewhere the environment says where they are:
    `JAX_COORDINATOR_ADDRESS=host:port`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
    """
    import jax

    address = next((os.environ[name] for name in _COORDINATOR if name in os.environ), None)
    processes, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    if address is not None and (processes is None) != (index is None):
        raise ValueError("distributed: set both JAX_NUM_PROCESSES and JAX_PROCESS_ID beside JAX_COORDINATOR_ADDRESS, or neither.")
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=None if processes is None else int(processes),
        process_id=None if index is None else int(index),
    )


def agree(what: str, value: int) -> None:
    """Refuse to go on where the processes of a run see different values: they would wait for each other for ever.

    Raises:
      ValueError: in every process; the message has the value of each.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    values = multihost_utils.process_allgather(np.int32(value)).tolist()
    if len(set(values)) > 1:
        raise ValueError(f"{what} is {values}, by process: not all of them see the same folder. Use one that they share, such as gs://….")


def gathered(value: Any) -> list[Any]:
    """Return what each process of a run has, in their order: plain data, floats to the last bit. All of them have to ask."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    mine = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(mine))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(mine.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]
