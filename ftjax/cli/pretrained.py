"""A model by name and an adapter on it, or several that have names, unmerged: what `generate` and `eval` begin with."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags as absl_flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import hub, peft, quant, sharding
from ftjax.cli import build, runtime
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import architecture
from ftjax.hf import load as hf_load
from ftjax.hf import peft as hf_peft
from ftjax.hf import tokenizer as hf_tokenizer
from ftjax.hf.folder import read_json
from ftjax.kernels import int4_matmul
from ftjax.models import Config
from ftjax.types import Model, Params, Transform

DEFAULT = "smollm2-135m-instruct"
CONFIGS = (hf_peft.CONFIG, hf_adapter.CONFIG)
"""Either of which makes a folder an adapter."""


class Adapted(NamedTuple):
    """A model, its parameters with the adapter attached, and where they came from."""

    model: Model
    params: Params
    """Those of `peft.stack_adapters` where adapters have names."""
    tokenizer: object
    name: str
    adapter: str
    """The adapter's folder, or nothing."""
    base: Params | None = None
    """The parameters without the adapter."""
    tokenizers: Mapping[str, Any] = {}
    """The tokenizer of each adapter that has a name, in the order of the stack."""

    @property
    def title(self) -> str:
        """The model, and the adapter on it."""
        return f"{self.name} + {self.adapter}" if self.adapter else self.name


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Define `--model`, `--adapter`, `--quantize`, `--implementation` and `--dtype`."""
    absl_flags.DEFINE_string(
        "model", "", f"a folder, a .gguf file, a hub id or a known name (default: the adapter's base, else {DEFAULT})", flags
    )
    about = "an adapter's folder, or the workdir of `ftjax train`; where rows choose, several as NAME=FOLDER (`generate --prompts` alone)"
    absl_flags.DEFINE_multi_string("adapter", [], about, flags)
    about = f"store the model's matrices as {', '.join(quant.METHODS)}; none: not; auto: as the run of the adapter had them"
    absl_flags.DEFINE_enum("quantize", "auto", ["auto", "none", *quant.METHODS], about, flag_values=flags)
    about = "of the products with packed matrices; empty: as the run of the adapter had it, else auto"
    absl_flags.DEFINE_enum("implementation", "", ["", "auto", *int4_matmul.IMPLEMENTATIONS], about, flag_values=flags)
    absl_flags.DEFINE_string("dtype", "auto", "of the weights: float32, bfloat16, or auto, which is bfloat16", flags)


def load(flags: absl_flags.FlagValues) -> Adapted:
    """Return the model that the flags name, the adapter on it, or the adapters that have names beside each other.

    Raises:
      ValueError: the model is unknown, an adapter belongs to another base, or nothing is packed for the implementation that is asked for.
      FileNotFoundError: an adapter's folder holds none.
    """
    folders = adapter_folders(flags.adapter)
    bases = {folder: base_name(folder, default=flags.model or DEFAULT) for folder in folders.values()}
    name = flags.model or next(iter(bases.values()), DEFAULT)
    for folder, base in bases.items():
        if base != name:  # the same model may go by many names, so this is no error
            print(f"note: the adapter {folder} names {base!r} as its base and is put on {name!r}", file=sys.stderr)
    quantizer = _quantizer(flags.quantize, list(folders.values()))
    change = partial(trained_in, list(folders.values()))
    found = hf_load.load(name, dtype=build.dtype(flags.dtype), change=change, quantizer=quantizer)
    if flags.implementation:
        found = found._replace(params=quant.multiplied_by(found.params, flags.implementation))
    found = found._replace(params=quant.for_device(found.params, sharding.make_mesh(devices=jax.local_devices()[:1])))
    if set(folders) <= {""}:
        folder = folders.get("")
        params = attach(found.model, found.params, folder)
        return Adapted(found.model, params, tokenizer(folder, found.model, base=found.tokenizer), name, str(folder or ""), found.params)
    stacked = peft.stack_adapters(found.params, {name: attach(found.model, found.params, folder) for name, folder in folders.items()})
    tokenizers = {name: tokenizer(folder, found.model, base=found.tokenizer) for name, folder in folders.items()}
    return Adapted(found.model, stacked, found.tokenizer, name, ", ".join(folders), found.params, tokenizers)


def of_name(name: str, *, dtype: str = "auto") -> Adapted:
    """Return what is at a name: a model, or the folder of an adapter or the workdir of its run, with its base."""
    given = any((Path(name) / inner / file).is_file() for inner in ("", "adapter") for file in CONFIGS)
    folder = adapter_folder(name) if given else None
    base = base_name(folder) if folder else name
    model, params, words, _ = hf_load.load(base, dtype=build.dtype(dtype), change=partial(trained_in, [folder] if folder else []))
    words = tokenizer(folder, model, base=words)
    return Adapted(model, attach(model, params, folder), words, base, str(folder or ""))


def template(adapted: Adapted) -> dict[str, Any]:
    """Return how what a run trained reads conversations, as options of an encoder; of others nothing, for their tokenizer says it."""
    run = run_of(Path(adapted.adapter)) if adapted.adapter else None
    return {name: run.data[name] for name in ("template", "template_variables")} if run else {}


def of_config(flags: absl_flags.FlagValues, mesh: Mesh) -> Adapted:
    """Return the model of `--config`, or another of its kind that `--model` names, on a mesh, and the adapter of `--adapter` on it."""
    if flags.model:
        flags.config.model.update({"name": flags.model, "random": False})
    found = build.model(flags.config, mesh)
    base, folder = quant.for_device(found.params, mesh), only_folder(flags.adapter)
    words = tokenizer(folder, found.model, base=found.tokenizer)
    return Adapted(found.model, attach(found.model, base, folder), words, found.name, str(folder or ""), base)


def trained_in(folders: Sequence[Path], config: Config) -> Config:
    """Return a base's architecture as the adapters of some folders were trained in it."""
    found = {folder: architecture.trained_in(folder, config) for folder in folders}
    if len(set(found.values())) > 1:
        names = ", ".join(map(str, folders))
        raise ValueError(f"--adapter: {names} were trained with different RoPEs, and a model has one: use them one by one.")
    return next(iter(found.values()), config)


def _quantizer(asked: str, folders: Sequence[Path]) -> Transform | None:
    """Return how the base is packed: as is asked, or as the runs that left these adapters had it."""
    if asked == "none":
        return None
    if asked != "auto":
        return quant.METHODS[asked]()
    runs = {folder: run_of(folder) for folder in folders}
    found = {folder: [(n, o) for n, o in build.methods(run) if n in quant.METHODS] if run else [] for folder, run in runs.items()}
    if any(one != other for one in found.values() for other in found.values()):
        raise ValueError("--adapter: the runs of these adapters had their base in different formats; say which by --quantize.")
    if not any(found.values()):
        return None
    names = " and ".join(name for name, _ in next(iter(found.values())))
    print(f"note: the base is stored as {names}, over which the adapter was trained; --quantize=none leaves it dense", file=sys.stderr)
    return build.quantizer(next(iter(runs.values())))


def run_of(folder: Path) -> ConfigDict | None:
    """Return the config of the run in whose workdir an adapter lies, if it does."""
    path = folder.resolve().parent / "config.json"
    stored = read_json(path) if path.is_file() else {}
    return ConfigDict(stored) if "methods" in stored else None


def attach(model: Model, params: Params, folder: Path | None) -> Params:
    """Return the parameters with the adapter of a folder on them, dropout off; the same parameters without one."""
    if folder is None:
        return params
    if (folder / hf_adapter.CONFIG).is_file():
        return hf_adapter.load_adapter(folder, model).attach(params)
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
    config = next(folder / name for name in CONFIGS if (folder / name).is_file())
    name = read_json(config).get("base_model_name_or_path") or default
    known = name.rsplit("/", 1)[-1].lower()
    return known if known in hub.WHEELS and not Path(name).exists() else name


def adapter_folders(given: Sequence[str]) -> dict[str, Path]:
    """Return `{name: PEFT folder}` of what `--adapter` was given: one without a name, or any number of `NAME=FOLDER`."""
    folders: dict[str, Path] = {}
    for value in filter(None, given):
        named = re.fullmatch(r"([\w.-]+)=(.+)", value)
        name, place = named.groups() if named and not Path(value).exists() else ("", value)
        if name in folders:
            raise ValueError(f"--adapter: {value!r} is a second one {f'named {name!r}' if name else 'without a name'}; write NAME=FOLDER.")
        folders[name] = adapter_folder(place)
    if "" in folders and len(folders) > 1:
        raise ValueError("--adapter: where there are several, each needs a name, as in --adapter=NAME=FOLDER.")
    return folders


def only_folder(given: Sequence[str]) -> Path | None:
    """Return the PEFT folder of the one adapter that `--adapter` was given, or None."""
    folders = adapter_folders(given)
    if set(folders) - {""}:
        raise ValueError("--adapter: one folder without a name is expected here.")
    return folders.get("")


def adapter_folder(name: str) -> Path:
    """Return the PEFT folder that is meant: `name` itself, or `adapter/` in it if it is a workdir."""
    folder = runtime.local_path("adapter", name)
    for choice in (folder, folder / "adapter"):
        if any((choice / name).is_file() for name in CONFIGS):
            return choice
    if not folder.is_dir():
        raise FileNotFoundError(f"--adapter: there is no folder {name!r}.")
    raise FileNotFoundError(f"--adapter: neither {name} nor {name}/adapter holds an {' or '.join(CONFIGS)}; a run writes it when it ends.")
