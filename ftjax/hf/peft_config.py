"""PEFT's `adapter_config.json`: the fields of its version 0.21, which method a file is of, and how its names match modules."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ftjax import tree
from ftjax.hf import names as hf_names
from ftjax.peft import FORMATS, SOFT_PROMPTS, Format

COMMON: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "target_modules": None,
    "modules_to_save": None,
}
"""The fields that PEFT writes for every method that rides on modules, and their defaults; a method's `Format` has the others."""

PATTERNS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
"""The config field that gives an option another value for some modules."""

_HONOURED = ("exclude_modules", "layers_to_transform")


def fields(form: Format) -> dict[str, Any]:
    """Return every config field of a method and its default."""
    return COMMON | form.defaults | {"peft_type": form.peft_type}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Return the method that a config describes, by its `peft_type` and by `Format.constants`; None if there is none."""
    kinds = [kind for kind, form in FORMATS.items() if form.peft_type == config.get("peft_type", COMMON["peft_type"])]

    def fit(kind: str) -> tuple[bool, int]:
        form = FORMATS[kind]
        return all(config.get(field, form.defaults[field]) == v for field, v in form.constants.items()), len(form.constants)

    return max(kinds, key=fit, default=None)


def check(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config with defaults filled in.

    Raises:
      ValueError: its method is unknown, it asks for something that is not implemented, or a field has an impossible value; all are listed.
    """
    kind = kind_of(config)
    if kind is None:
        types = dict.fromkeys(form.peft_type for form in (*FORMATS.values(), *SOFT_PROMPTS.values()))
        raise ValueError(f"{where}: not yet: peft_type={config['peft_type']!r}; nearest: {tree.nearest(str(config['peft_type']), types)}")
    form = FORMATS[kind]
    unknown = sorted(config.keys() - fields(form).keys())
    if unknown:
        logging.getLogger(__name__).warning(
            "%s: ignoring fields that PEFT 0.21 does not know for %s: %s", where, form.peft_type, ", ".join(unknown)
        )
    full = {**fields(form), **{name: value for name, value in config.items() if name in fields(form)}}
    full |= {field: full[field] or {} for field in PATTERNS.values() if field in full}
    problems = _not_yet(full, form) + _wrong_values(full, form)
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return full


def _not_yet(config: Mapping[str, Any], form: Format) -> list[str]:
    """Return the fields that change what the adapter computes in a way that the method does not know."""
    lists, patterns = (field for field, _ in form.lists.values()), (PATTERNS[option] for option in form.patterns)
    spoken_of = {*form.options.values(), *form.writes, *lists, *patterns, *form.ignored, *_HONOURED}
    expected = {field: v for field, v in form.defaults.items() if field not in spoken_of} | dict(form.constants)
    problems = [f"not yet: {field}={config[field]!r}" for field, v in expected.items() if (config[field] or None) != (v or None)]
    for field, beginnings in form.refused.items():
        if str(config[field]).startswith(beginnings):
            problems.append(f"not yet: {field}={config[field]!r}, which changes the base weights: save it converted to {form.peft_type}")
    for option, names in form.values.items():
        if config[form.options[option]] not in names.values():
            field = form.options[option]
            problems.append(f"not yet: {field}={config[field]!r}, only {', '.join(map(repr, names.values()))}")
    return problems


def _wrong_values(config: Mapping[str, Any], form: Format) -> list[str]:
    problems, patterns = [], []
    for option, (fits, what) in _KINDS.items():
        field, pattern = form.options.get(option), PATTERNS.get(option)
        if field is None:
            continue
        others = config.get(pattern, {})
        if not isinstance(others, dict):
            return ["rank_pattern and alpha_pattern are objects, from a module's name to a number"]
        if not all(map(fits, (config[field], *others.values()))):
            also = f" or {pattern}={others!r} holds what" if others else ""
            problems.append(f"{field}={config[field]!r}{also} is not {what}")
        patterns += others
    if not isinstance(config["target_modules"], str | list) or not config["target_modules"]:
        problems.append(f"target_modules={config['target_modules']!r} names no module")
    for pattern in (*patterns, config["target_modules"], config.get("exclude_modules")):
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda value: isinstance(value, int) and value >= 1, "a rank"),
    "alpha": (_is_number, "a number"),
    "dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a probability"),
}


def as_number(value: float) -> int | float:
    """Return the number as PEFT writes it: without `.0` where it is whole."""
    return int(value) if float(value).is_integer() else float(value)


def to_peft(form: Format, option: str, value: Any) -> Any:
    """Return an option's value as PEFT writes it."""
    if option in form.values:
        return form.values[option][value]
    return as_number(value) if option == "alpha" else float(value) if option == "dropout" else value


def from_peft(form: Format, option: str, value: Any) -> Any:
    """Return an option's value from what PEFT wrote; the inverse of `to_peft`."""
    if option in form.values:
        return next(ours for ours, theirs in form.values[option].items() if theirs == value)
    return float(value) if option in ("alpha", "dropout") else value


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Return those of a model's linear modules that the config targets, by PEFT's rules."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    found = set()
    for module in modules:
        if _matches(config.get("exclude_modules") or (), module):
            continue
        if targets == "all-linear":
            chosen = module not in ("lm_head", "model.embed_tokens")
        else:
            chosen = _matches(targets, module)
        if layers and not isinstance(targets, str):
            number = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            chosen = chosen and number is not None and int(number[1]) in layers
        if chosen:
            found.add(module)
    return found


def value_of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return what `rank_pattern` or `alpha_pattern` says of a module: the first key that is a regular expression of its name's end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def shortest_names(chosen: Collection[str], modules: Collection[str], matches: Callable[[str, str], bool]) -> list[str]:
    """Return the shortest ends of names that select exactly `chosen` among `modules`.

    Args:
      chosen: Hugging Face modules, of all layers.
      modules: all of the model's.
      matches: `matches(module, end)`: PEFT's rule for the field.
    """
    names = {}
    for module in chosen:
        parts = re.sub(r"^model\.layers\.\d+\.", "", module).split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found = next((end for end in ends if all(other in chosen for other in modules if matches(other, end))), None)
        if found is None:
            raise ValueError(f"peft: no name selects {module!r} without selecting other modules too")
        names[found] = None
    return sorted(names)


def short(paths: Iterable[str], leaves: Mapping[str, Any]) -> list[str]:
    """Return the shortest names that target exactly these leaves of a model, of all layers."""
    return shortest_names(owners(paths, leaves), owners(leaves, leaves), ends_at_dot)


def owners(paths: Iterable[str], leaves: Mapping[str, Any]) -> set[str]:
    """Return the modules of these leaves."""
    return {module for path in paths for module in hf_names.modules(path, leaves[path].shape)}


def ends_at_dot(module: str, end: str) -> bool:
    """PEFT's rule for `target_modules`."""
    return module == end or module.endswith(f".{end}")


def _matches(targets: str | Collection[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(ends_at_dot(module, target) for target in targets)
