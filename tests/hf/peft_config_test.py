"""PEFT's way of naming modules, as its own code resolves it."""

import pytest

from ftjax.hf import peft_config

MODULES = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")] + ["lm_head"]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"target_modules": ["q_proj"]}, 12),
        ({"target_modules": ["proj"]}, 0),  # a whole name, not the end of one
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, 1),
        ({"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]}, 2),
        ({"target_modules": r".*\.layers\.(0|1)\..*_proj"}, 6),
        ({"target_modules": "all-linear"}, 36),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": 3}, 1),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, 12),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\.self_attn\..*"}, 22),
    ],
)
def test_targets_are_resolved_as_in_peft(config, count):
    assert len(peft_config.targeted(peft_config.check(config, "test"), MODULES)) == count


@pytest.mark.parametrize(
    ("patterns", "value"),
    [
        ({"q_proj": 2}, 2),
        ({"_proj": 2}, 8),
        ({"layers.1.self_attn.q_proj": 3}, 3),
        ({"layers.11.self_attn.q_proj": 3}, 8),
        ({".*q_.*": 4, "q_proj": 5}, 4),
    ],
)
def test_patterns_match_the_end_of_a_name_and_the_first_wins(patterns, value):
    assert peft_config.value_of(patterns, "model.layers.1.self_attn.q_proj", 8) == value
