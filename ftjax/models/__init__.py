"""Language models: a config, a tree of parameters, and pure functions over it."""

from __future__ import annotations

from ftjax.models.apart import apart, apart_cache, separable, turned_bytes
from ftjax.models.cache import Cache, init_cache
from ftjax.models.config import Config
from ftjax.models.decoder import make_model
from ftjax.models.families import FAMILIES
from ftjax.models.hf_config import config_from_hf, stretch, to_hf
from ftjax.models.presets import PRESETS, preset
from ftjax.models.virtual import prefix_of
from ftjax.types import Model

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Cache",
    "Config",
    "Model",
    "apart",
    "apart_cache",
    "build",
    "config_from_hf",
    "init_cache",
    "prefix_of",
    "preset",
    "separable",
    "stretch",
    "to_hf",
    "turned_bytes",
]


def build(
    config: Config,
    *,
    remat: str = "none",
    dtype: str | None = None,
    scan: bool = True,
    attention: str = "auto",
    group_tokens: int | None = None,
) -> Model:
    """Return the model of one architecture.

    Args:
      config: see `config_from_hf`.
      remat: what the backward pass computes again of each layer: `"none"`, `"full"` for all of it (its input alone is stored), or
        `"elementwise"` for all but its matrix products, the best trade where memory is not scarce: a third of the memory of `"none"`.
      dtype: that of the activations; None means that of the embedding.
      scan: scan over the stacked layers, so that compile time does not grow with depth, or unroll them.
      attention: a key of `ftjax.kernels.attention.IMPLEMENTATIONS`, or `"auto"`.
      group_tokens: the size of the groups that attention stays in, an even number, or None for none: shifted sparse attention, for training
        alone (LongLoRA; see `ftjax.kernels.attention.groups`).

    Raises:
      ValueError: the config contradicts itself or an option has no such value.
    """
    return make_model(
        config, FAMILIES[config.model_type], remat=remat, dtype=dtype, scan=scan, attention=attention, group_tokens=group_tokens
    )
