"""Reading a config: a Python file with `get_config(arg)`, overridden from the command line, compared with the one a run began with."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from ftjax.tree import nearest

FLAG = "config"
MAY_CHANGE = ("steps", "logging", "eval", "checkpoint", "early_stopping", "max_skipped_steps", "mesh")
"""What a resumed run may change: none of it alters a step that is done. (`steps` does alter the schedule of those to come.)"""


def define(flags: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Define `--config=FILE[:arg]` and one flag for each of its fields that `argv` overrides.

    Raises:
      ValueError: there is no such file, or the command line names a field that the config has not; the message has the nearest.
    """
    argv, about = _joined(argv), "the run: FILE.py or FILE.py:smoke; --config.FIELD=VALUE changes a field"
    spec = next((argument.split("=", 1)[1] for argument in argv if argument.lstrip("-").startswith(f"{FLAG}=")), None)
    if spec is None:
        if stray := next((argument for argument in argv if argument.lstrip("-").startswith(f"{FLAG}.")), None):
            raise ValueError(f"config: {stray} changes a field of a config; give --config=FILE before it.")
        absl_flags.DEFINE_string(FLAG, None, about, flag_values=flags)
        return
    config = load(spec)
    _check_overrides(config, argv)
    config_flags.DEFINE_config_dict(FLAG, config, about, flag_values=flags, sys_argv=argv)
    flags[FLAG].parser = _FileParser()


class _FileParser(absl_flags.ArgumentParser):
    """Turns FILE into its config; ml_collections' own does so by a function that Python has deprecated."""

    def parse(self, argument: str) -> ConfigDict:
        return load(argument).lock()

    def flag_type(self) -> str:
        return "config file"


def _joined(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `--config FILE` written as `--config=FILE`, which is the one form that the rest reads."""
    argv, joined = list(argv), []
    while argv:
        argument = argv.pop(0)
        joined.append(f"{argument}={argv.pop(0)}" if argument in ("--config", "-config") and argv else argument)
    return joined


def load(spec: str) -> ConfigDict:
    """Return the config that `FILE.py[:arg]` describes."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"config: there is no file {str(path)!r}; nearest: {nearest(str(path), others)}.")
    module_spec = importlib.util.spec_from_file_location(f"{path.stem}_config", path)
    module = importlib.util.module_from_spec(module_spec)
    with _importable(path), _mistyped_fields():
        module_spec.loader.exec_module(module)
        return module.get_config(arg)


@contextlib.contextmanager
def _mistyped_fields() -> Iterator[None]:
    """Turn what a locked ConfigDict raises at an unknown field into our own error: file and line, and the nearest of its block."""
    try:
        yield
    except (KeyError, AttributeError) as error:
        *frames, (inside, _) = traceback.walk_tb(error.__traceback__)
        block = inside.f_locals.get("self")
        if not isinstance(block, ConfigDict):
            raise
        name = inside.f_locals.get("key", inside.f_locals.get("attribute"))
        file, line = next((f.f_code.co_filename, line) for f, line in reversed(frames) if not f.f_globals["__name__"].startswith("ml_"))
        raise ValueError(
            f"config: {file}:{line}: there is no field {name!r} in this block; nearest: {nearest(str(name), map(str, block))}."
        ) from error


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Let the config file say `from configs import base`, wherever the command runs."""
    folder = str(path.resolve().parent.parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def fields(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"data.batch_size": 8, …}`: the leaves by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)) and len(value):
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
    known = fields(config)
    branches = {name.rsplit(".", n)[0] for name in known for n in range(1, name.count(".") + 1)}
    for argument in argv:
        bare = argument.lstrip("-").split("=", 1)[0]
        if not argument.startswith("-") or not bare.removeprefix("no").startswith(f"{FLAG}."):
            continue
        name = bare.split(".", 1)[1]
        if name not in known and name not in branches:
            raise ValueError(f"config: there is no field {name!r}; nearest: {nearest(name, known)}.")


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Return the config as plain data, as a checkpoint stores it."""
    return json.loads(config.to_json())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each field that a resumed run may not change but does."""
    before, after = fields(old), fields(new)
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name, "absent") != after.get(name, "absent")]
    return [
        f"{name}: {before.get(name, 'absent')!r} -> {after.get(name, 'absent')!r}"
        for name in changed
        if name.split(".")[0] not in MAY_CHANGE
    ]


def check_unchanged(old: Mapping[str, Any], new: Mapping[str, Any], *, allowed: bool = False) -> None:
    """Refuse to go on with a run under another config, unless `allowed`.

    Raises:
      ValueError: fields differ that a resumed run may not change; the message lists them.
    """
    changed = differences(old, new)
    if changed and not allowed:
        listing = "\n  ".join(changed)
        raise ValueError(
            f"config: this workdir holds a run of another config:\n  {listing}\n"
            "Choose another --workdir, take the change back, or go on all the same with --allow_config_change."
        )


def help_lines(config: ConfigDict | None) -> list[str]:
    """Return the fields of a config with their values, for `--help`."""
    if config is None:
        return ["Add --config=FILE to see the fields of that config here."]
    lines = ["fields of the config, each changed by --config.FIELD=VALUE:"]
    return lines + [f"  {name:32s} {value!r}" for name, value in fields(config).items()]


def plain(block) -> dict[str, Any]:
    """Return a block of the config as a dict of plain values."""
    return block.to_dict() if isinstance(block, ConfigDict) else dict(block)


def named(field: str, function: Callable[[Any], Any], value: Any) -> Any:
    """Return `function(value)`; its error names the field of the config."""
    try:
        return function(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
