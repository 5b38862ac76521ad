"""PEFT's `adapter_config.json`: the fields of its version 0.21, which of them we honour, and how its names match modules."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}
"""Every field that PEFT writes, and its default."""

# Fields that change what the adapter computes, in a way we have no method for.
_NOT_YET = (
    "fan_in_fan_out layers_pattern megatron_config trainable_token_indices use_dora velora_config alora_invocation_tokens use_qalora "
    "monteclora_config layer_replication lora_bias target_parameters use_bdlora arrow_config kasa_config"
).split()
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the adapter is relative to other base weights than the published ones."""


def check(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config with defaults filled in.

    Raises:
      ValueError: it asks for something that is not implemented, or a field has an impossible value; all are listed.
    """
    unknown = sorted(config.keys() - DEFAULTS.keys())
    if unknown:
        logging.getLogger(__name__).warning("%s: ignoring fields that PEFT 0.21 does not know: %s", where, ", ".join(unknown))
    full = {**DEFAULTS, **{name: value for name, value in config.items() if name in DEFAULTS}}
    problems = [f"not yet: {name}={full[name]!r}" for name in _NOT_YET if full[name]]
    if full["peft_type"] != "LORA":
        problems.append(f"not yet: peft_type={full['peft_type']!r}, only 'LORA'")
    if full["bias"] != "none":
        problems.append(f"not yet: bias={full['bias']!r}, only 'none'")
    if str(full["init_lora_weights"]).startswith(_RESIDUAL_INITS):
        problems.append(
            f"not yet: init_lora_weights={full['init_lora_weights']!r}, which changes the base weights: save it converted to LoRA"
        )
    if not isinstance(full["r"], int) or full["r"] < 1:
        problems.append(f"r={full['r']!r} is not a rank")
    if not isinstance(full["target_modules"], str | list) or not full["target_modules"]:
        problems.append(f"target_modules={full['target_modules']!r} names no module")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return full


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Return those of a model's linear modules that the config targets, by PEFT's rules."""
    targets, layers = config["target_modules"], config["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers
    found = set()
    for module in modules:
        if _matches(config["exclude_modules"] or (), module):
            continue
        if targets == "all-linear":
            chosen = module != "lm_head"
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


def ends_at_dot(module: str, end: str) -> bool:
    """PEFT's rule for `target_modules`."""
    return module == end or module.endswith(f".{end}")


def _matches(targets: str | Collection[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(ends_at_dot(module, target) for target in targets)
