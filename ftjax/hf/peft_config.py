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
    problems += _wrong_values(full)
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return full | {"rank_pattern": full["rank_pattern"] or {}, "alpha_pattern": full["alpha_pattern"] or {}}


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    problems = []
    ranks, alphas = config["rank_pattern"] or {}, config["alpha_pattern"] or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return ["rank_pattern and alpha_pattern are objects, from a module's name to a number"]
    if not all(isinstance(rank, int) and rank >= 1 for rank in (config["r"], *ranks.values())):
        problems.append(f"r={config['r']!r} or rank_pattern={ranks!r} holds what is not a rank")
    if not all(isinstance(alpha, int | float) for alpha in (config["lora_alpha"], *alphas.values())):
        problems.append(f"lora_alpha={config['lora_alpha']!r} or alpha_pattern={alphas!r} holds what is not a number")
    if not isinstance(config["lora_dropout"], int | float) or not 0 <= config["lora_dropout"] < 1:
        problems.append(f"lora_dropout={config['lora_dropout']!r} is not a probability")
    if not isinstance(config["target_modules"], str | list) or not config["target_modules"]:
        problems.append(f"target_modules={config['target_modules']!r} names no module")
    for pattern in (*ranks, *alphas, config["target_modules"], config["exclude_modules"]):
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}")
    return problems


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Return those of a model's linear modules that the config targets, by PEFT's rules."""
    targets, layers = config["target_modules"], config["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers
    found = set()
    for module in modules:
        if _matches(config["exclude_modules"] or (), module):
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


def ends_at_dot(module: str, end: str) -> bool:
    """PEFT's rule for `target_modules`."""
    return module == end or module.endswith(f".{end}")


def _matches(targets: str | Collection[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(ends_at_dot(module, target) for target in targets)
