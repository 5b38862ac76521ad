"""Paths and Hugging Face names are one map, both ways."""

import jax
import pytest

from ftjax import models, tree
from ftjax.hf import names

EXAMPLES = {
    "model.layers.7.self_attn.q_proj.weight": ("layers/self_attn/q_proj/kernel", 7),
    "model.layers.11.self_attn.q_proj.bias": ("layers/self_attn/q_proj/bias", 11),
    "model.layers.0.self_attn.k_norm.weight": ("layers/self_attn/k_norm/scale", 0),
    "model.layers.0.post_attention_layernorm.weight": ("layers/post_attention_layernorm/scale", 0),
    "model.embed_tokens.weight": ("embed_tokens/kernel", None),
    "model.norm.weight": ("norm/scale", None),
    "lm_head.weight": ("lm_head/kernel", None),
    "score.weight": ("value_head/kernel", None),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_name_has_its_path(name):
    assert names.path(name) == EXAMPLES[name]


@pytest.mark.parametrize("preset", [name for name in models.PRESETS if name.startswith("tiny-")])
def test_every_leaf_of_a_family_goes_there_and_back(preset):
    model = models.build(models.preset(preset))
    for path, leaf in tree.flatten(jax.eval_shape(model.init, jax.random.key(0))).items():
        found = names.tensors(path, leaf.shape)
        assert [names.path(name) for name in found] == [(path, i if names.is_stacked(path) else None) for i in range(len(found))]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.", ""])
@pytest.mark.parametrize("rest", ["layers.3.mlp.up_proj.weight", "embed_tokens.weight", "norm.weight"])
def test_multimodal_and_headless_names_are_those_of_the_text_model(prefix, rest):
    assert names.canonical(prefix + rest) == "model." + rest


def test_the_head_of_a_multimodal_model_is_the_head():
    assert names.canonical("language_model.lm_head.weight") == "lm_head.weight" == names.canonical("lm_head.weight")


def test_matrices_are_transposed_but_the_embedding_is_not():
    assert names.leaf_shape("layers/mlp/up_proj/kernel", (2, 3, 5)) == (5, 3)
    assert names.leaf_shape("lm_head/kernel", (3, 7)) == (7, 3)
    assert names.leaf_shape("embed_tokens/kernel", (7, 3)) == (7, 3)
    assert names.leaf_shape("layers/mlp/up_proj/bias", (2, 5)) == (5,)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.blocks.0.weight"])
def test_known_extras_are_ignorable_and_others_are_not(name):
    assert names.ignorable(name) and not names.ignorable("model.layers.0.self_attn.q_proj.weight")


def test_what_is_no_parameter_is_refused():
    with pytest.raises(ValueError, match="'model.norm.gamma' is not the name of a parameter"):
        names.path("model.norm.gamma")
