"""A model by name and an adapter on it, unmerged: what `generate` and `eval` begin with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from ftjax import hub
from ftjax.cli import build, runtime
from ftjax.hf import load as hf_load
from ftjax.hf import peft as hf_peft
from ftjax.hf import tokenizer as hf_tokenizer
from ftjax.hf.folder import read_json
from ftjax.types import Model, Params

DEFAULT = "smollm2-135m-instruct"


class Adapted(NamedTuple):
    """A model, its parameters with the adapter attached, and where they came from."""

    model: Model
    params: Params
    tokenizer: object
    name: str
    adapter: str
    """The adapter's folder, or nothing."""


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Define `--model`, `--adapter` and `--dtype`."""
    absl_flags.DEFINE_string(
        "model", "", f"a folder, a .gguf file, a hub id or a known name (default: the adapter's base, else {DEFAULT})", flags
    )
    absl_flags.DEFINE_string("adapter", "", "a PEFT folder, or the workdir of `ftjax train`", flags)
    absl_flags.DEFINE_string("dtype", "auto", "of the weights: float32, bfloat16, or auto for the faster one here", flags)


def load(flags: absl_flags.FlagValues) -> Adapted:
    """Return the model that the flags name, the adapter on it.

    Raises:
      ValueError: the model is unknown, or the adapter belongs to another base.
      FileNotFoundError: the adapter's folder holds none.
    """
    folder = adapter_folder(flags.adapter) if flags.adapter else None
    base = base_name(folder, default=flags.model or DEFAULT) if folder else DEFAULT
    name = flags.model or base
    if folder and name != base:  # the same model may go by many names, so this is no error
        print(f"note: the adapter {folder} names {base!r} as its base and is put on {name!r}", file=sys.stderr)
    found = hf_load.load(name, dtype=build.dtype(flags.dtype))
    params = attach(found.model, found.params, folder)
    return Adapted(found.model, params, tokenizer(folder, found.model, base=found.tokenizer), name, str(folder or ""))


def attach(model: Model, params: Params, folder: Path | None) -> Params:
    """Return the parameters with the adapter of a folder on them, dropout off; the same parameters without one."""
    if folder is None:
        return params
    adapter = hf_peft.load_adapter(folder, model)
    return adapter.method.attach(adapter.join(params), adapter.trainable)


def tokenizer(folder: Path | None, model: Model, *, base: Any) -> Any:
    """Return the tokenizer beside an adapter, whose chat template is the one that was trained; the base model's if there is none."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return base
    found = hf_tokenizer.load(folder)
    if len(found) > model.config.vocab_size:
        print(f"note: the tokenizer of {folder} has more tokens than the model, so the base's is used", file=sys.stderr)
        return base
    found.chat_template = found.chat_template or base.chat_template  # older adapters come without one
    return found


def base_name(folder: Path, *, default: str = DEFAULT) -> str:
    """Return the model that an adapter says it belongs to, the registry's copy if there is one; `default` if it says nothing."""
    name = read_json(folder / hf_peft.CONFIG).get("base_model_name_or_path") or default
    known = name.rsplit("/", 1)[-1].lower()
    return known if known in hub.WHEELS and not Path(name).exists() else name


def adapter_folder(name: str) -> Path:
    """Return the PEFT folder that is meant: `name` itself, or `adapter/` in it if it is a workdir."""
    folder = runtime.local_path("adapter", name)
    for choice in (folder, folder / "adapter"):
        if (choice / hf_peft.CONFIG).is_file():
            return choice
    if not folder.is_dir():
        raise FileNotFoundError(f"--adapter: there is no folder {name!r}.")
    raise FileNotFoundError(f"--adapter: neither {name} nor {name}/adapter holds an {hf_peft.CONFIG}; a run writes it when it ends.")
