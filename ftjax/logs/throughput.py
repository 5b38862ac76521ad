"""How fast a run is: tokens a second, memory, and the fraction of the machine's peak that the model's own arithmetic takes (MFU).

Floating-point operations of one training step (a multiply-add is two):

    trunk      tokens · (4 · frozen + 6 · trained weights in matrices)      a frozen matrix needs y = x W and dx, but no dW
    head       supervised tokens · v · d · (4 if it is frozen, else 6)      logits are computed where the loss counts them
    attention  12 · h · c · Σ over layers and queries of the keys that each sees: two products forward, four backward

A prompt is more tokens in each row, and a prefix more keys. The embedding is a look-up and counts nothing; nor does the network behind a
prompt, nor what a reference says of the batch, nor what rematerialisation computes twice: it is the model's work, not the machine's.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from ftjax import tree
from ftjax.kernels.product import product
from ftjax.peft import REFERENCE
from ftjax.types import Batch, Params

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
"""Dense bfloat16 operations a second by the start of `device_kind`, from the makers' data sheets; the longest match counts."""


def flops_per_batch(frozen: Params, trainable: Params, config, batch: Batch, *, group_tokens: int = 0) -> float:
    """Return the operations of one training step on `batch` (numpy arrays), by the formula above.

    Args:
      frozen: the frozen tree: arrays, weights or shapes.
      trainable: `{method: tree}`; a leaf whose path and shape are also the base's is trained in full, any other is an addition.
      config: the architecture: its heads, their width and the window of each layer.
      batch: its masks say how many tokens count and how many keys each query sees.
      group_tokens: the size of the groups that attention stays in, half of the heads in shifted ones; 0 for none.
    """
    own = {name: branch for name, branch in frozen.items() if name != REFERENCE}
    base = {path: leaf for path, leaf in tree.flatten(own).items() if path.endswith("/kernel")}
    added, full = 0, set()
    for method in trainable.values():
        for path, leaf in tree.flatten(method).items():
            if path in base and base[path].shape == leaf.shape:
                full.add(path)
            elif leaf.ndim >= 2 and not path.startswith(("prompt/", "layers/slots/prefix/")):
                added += leaf.size
    head = "lm_head/kernel" if "lm_head/kernel" in base else "embed_tokens/kernel"
    trunk = {path: int(np.prod(leaf.shape)) for path, leaf in base.items() if path not in ("lm_head/kernel", "embed_tokens/kernel")}
    per_token = sum(count * (6 if path in full else 4) for path, count in trunk.items()) + 6 * added
    real = np.asarray(batch.segment_ids) > 0
    prefix, prompt = _virtual_tokens(trainable)
    rows = int(real.any(axis=-1).sum())
    keys = np.where(real, np.asarray(batch.positions) + 1 + prefix + prompt, 0)
    keys = np.concatenate([keys.ravel(), np.tile(prefix + 1 + np.arange(prompt), rows)])
    shifts = (0, group_tokens // 2) if group_tokens else ()
    halves = [np.minimum(keys, (keys - 1 + shift) % group_tokens + 1) for shift in shifts] or [keys]
    limits = [window or np.inf for window in config.windows]
    seen = sum(float(np.minimum(half, limit).sum()) for half in halves for limit in limits) / len(halves)
    attention = 12.0 * config.num_attention_heads * config.head_dim * seen
    head_flops = float((np.asarray(batch.loss_mask) > 0).sum()) * int(np.prod(base[head].shape)) * (6 if head in full else 4)
    return float(real.sum() + rows * prompt) * per_token + attention + head_flops


def _virtual_tokens(trainable: Params) -> tuple[int, int]:
    """Return how many keys a prefix adds to each row, and how many tokens a prompt; see `ftjax.peft.soft_prompt`."""
    flat = [(path, leaf.shape) for method in trainable.values() for path, leaf in tree.flatten(method).items()]
    prefix = sum(shape[-2] for path, shape in flat if path in ("layers/slots/prefix/key", "layers/slots/prefix/embedding"))
    return prefix, sum(shape[0] for path, shape in flat if path == "prompt/embedding")


def peak_flops(dtype: str = "float32") -> float:
    """Return the operations a second that all local devices could do: the data sheet's, or on a CPU what a large matmul reaches."""
    device = jax.local_devices()[0]
    known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    if known:
        return PEAK_FLOPS[max(known, key=len)] * jax.local_device_count()
    return measure_matmul(dtype)


def measure_matmul(dtype: str, *, size: int = 1536, repeats: int = 4) -> float:
    """Return the operations a second of the fastest of a few `size`³ matmuls: a peak that a machine can show."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(product)
    multiply(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory() -> int:
    """Return the most bytes held so far: by the fullest local device, or by this process where devices do not say (CPU)."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(found, default=0):
        return max(found)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_seconds() -> float:
    """Return how long ago this process began: imports, compilation and all."""
    return time.time() - psutil.Process().create_time()


class Meter:
    """Tokens a second and MFU between two readings.

    Args:
      peak: operations a second, from `peak_flops`.
    """

    def __init__(self, peak: float):
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now; call it after work that is not training."""
        self._start, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of other work inside an interval out of it, such as that of sampling."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began

    def add(self, tokens: int, flops: float) -> None:
        """Count the tokens and operations of a step."""
        self._tokens += tokens
        self._flops += flops

    def read(self) -> dict[str, float]:
        """Return `tokens_per_second`, `mfu` and `memory_gb`, and begin a new interval."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        found = {
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._flops / seconds / self._peak,
            "memory_gb": peak_memory() / 1e9,
        }
        self.restart()
        return found
