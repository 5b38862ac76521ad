"""The published architectures have the published number of parameters."""

import jax
import pytest

from ftjax import models, tree

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-65b": 65_285_660_672,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
}


@pytest.mark.parametrize("name", [name for name in models.PRESETS if not name.startswith("tiny-")])
def test_presets_have_the_published_number_of_parameters(name, key):
    shapes = jax.eval_shape(models.build(models.preset(name)).init, key)
    assert tree.size(shapes) == PARAMETERS[name]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {models.preset(name).dtype}


def test_every_family_has_a_tiny_preset():
    tiny = {models.preset(name).model_type for name in models.PRESETS if name.startswith("tiny-")}
    assert tiny == set(models.FAMILIES)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'llama-3-8b'"):
        models.preset("llama3-8b")
