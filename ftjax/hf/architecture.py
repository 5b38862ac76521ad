"""The architecture that an adapter was trained in, as a `config.json` beside it, where that is not the base's own: a stretched RoPE.

PEFT's config has no place for a RoPE, and an adapter on a model whose positions turn otherwise loads without a word and is worthless.
Who uses such a folder in transformers hands it on: `from_pretrained(BASE, config=AutoConfig.from_pretrained(FOLDER))`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ftjax import models
from ftjax.hf.folder import read_json
from ftjax.hf.write import write_json
from ftjax.models import Config

CONFIG = "config.json"


def write(folder: str | Path, config: Config) -> None:
    """Write the architecture that the adapter in a folder was trained in."""
    write_json(Path(folder) / CONFIG, models.to_hf(config))


def trained_in(folder: str | Path, config: Config) -> Config:
    """Return a base's architecture as the adapter in a folder was trained in it: the base's own, if the folder says nothing.

    Use it as `hf.load.load(base, change=partial(architecture.trained_in, folder))`.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return config
    found = models.config_from_hf(read_json(path))
    return dataclasses.replace(config, rope=found.rope, max_position_embeddings=found.max_position_embeddings)


def check(folder: str | Path, config: Config) -> None:
    """Refuse a model with another RoPE than the one that the adapter in a folder was trained with.

    Raises:
      ValueError: they differ; a folder that says nothing fits every model.
    """
    expected = trained_in(folder, config).rope
    if expected != config.rope:
        raise ValueError(
            f"adapter: {folder} was trained with {_shown(expected)}, and this model has {_shown(config.rope)}: load the base with "
            "hf.load.load(…, change=partial(hf.architecture.trained_in, folder)), or set model.rope in the config."
        )


def _shown(rope: models.config.Rope) -> str:
    changed = {
        f.name: getattr(rope, f.name) for f in dataclasses.fields(rope) if f.name != "rope_type" and getattr(rope, f.name) != f.default
    }
    return f"the RoPE {rope.rope_type} ({', '.join(f'{name} {value:g}' for name, value in changed.items())})"
