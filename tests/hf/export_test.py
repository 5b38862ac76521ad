"""Exported folders: bitwise what was in the tree, whole or not there at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree
from ftjax.hf import export, folder, load, tokenizer

PRESETS = sorted(name for name in models.PRESETS if name.startswith("tiny-"))


def random_params(model, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype), jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def model():
    return models.build(models.preset("tiny-llama"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_round_trip_is_bitwise(tmp_path, preset, dtype):
    model = models.build(models.preset(preset))
    params = random_params(model, dtype)
    checkpoint = folder.read(export.export_model(tmp_path / "out", model, params, None))
    again = load.load_params(checkpoint, model)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), again, params)
    assert models.config_from_hf(checkpoint.config | {"torch_dtype": model.config.dtype}) == model.config
    assert checkpoint.config["torch_dtype"] == jnp.dtype(dtype).name


def test_an_untied_head_goes_out_and_in(tmp_path):
    model = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | {"tie_word_embeddings": False}))
    params = random_params(model)
    again = load.load_params(folder.read(export.export_model(tmp_path / "out", model, params, None)), model)
    np.testing.assert_array_equal(again["lm_head"]["kernel"], params["lm_head"]["kernel"])


def test_shards_are_small_and_their_index_is_right(tmp_path, model):
    params = random_params(model)
    out = export.export_model(tmp_path / "out", model, params, None, shard_bytes=20_000)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / folder.INDEX).read_text())
    assert len(files) > 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == tree.num_bytes(params)
    assert all(len(folder.file_tensors(path)) == 1 or path.stat().st_size < 25_000 for path in files)
    jax.tree.map(np.testing.assert_array_equal, load.load_params(folder.read(out), model), params)


def test_an_adapter_is_merged_as_merge_merges_it(tmp_path, model, key):
    method = peft.lora(rank=2)
    frozen = random_params(model, jnp.bfloat16)
    trained = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), jax.eval_shape(method.init, key, frozen)[1])
    out = export.export_model(tmp_path / "out", model, method.attach(frozen, trained), None)
    merged = peft.merge(method, frozen, trained)
    jax.tree.map(np.testing.assert_array_equal, load.load_params(folder.read(out), model), merged)


def test_tensors_can_be_written_in_another_dtype(tmp_path, model):
    params = random_params(model)
    out = export.export_model(tmp_path / "out", model, params, None, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, load.load_params(folder.read(out), model), rounded)


def test_tokenizer_template_card_and_generation_config_come_along(tmp_path, model):
    tokens = tokenizer.byte_tokenizer()
    out = export.export_model(tmp_path / "out", model, random_params(model), tokens, base_name="org/base")
    assert tokenizer.load(out).chat_template == tokens.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [tokens.eos_token_id, model.config.eos_token_id]
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "base_model: org/base" in (out / "README.md").read_text()


def test_a_tree_that_does_not_fit_leaves_nothing(tmp_path, model):
    flat = tree.flatten(random_params(model))
    del flat["norm/scale"]
    flat["layers/mlp/up_proj/kernel"] = flat["layers/mlp/down_proj/kernel"]
    flat["extra/kernel"] = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="3 problems") as error:
        export.export_model(tmp_path / "out", model, tree.unflatten(flat), None)
    assert [line.split(" ")[2:4] for line in str(error.value).splitlines()[1:]] == [
        ["missing:", "norm/scale"],
        ["extra:", "extra/kernel"],
        ["misshapen:", "layers/mlp/up_proj/kernel"],
    ]
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path, model):
    class Broken:
        eos_token_id = None

        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export.export_model(tmp_path / "out", model, random_params(model), Broken())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        export.export_model(tmp_path / "out", model, random_params(model), None)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_value_head_is_a_classifier_of_one_label_and_comes_back(tmp_path, tied, key):
    model = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | {"tie_word_embeddings": tied}))
    method = peft.value_head(init="normal")
    params = method.attach(*method.init(key, random_params(model, jnp.bfloat16)))
    tokens = tokenizer.byte_tokenizer()
    out = export.export_model(tmp_path / "out", model, params, tokens)
    assert folder.read(out).config["architectures"] == ["LlamaForSequenceClassification"]
    assert not (out / "generation_config.json").exists() and "AutoModelForSequenceClassification" in (out / "README.md").read_text()
    found = load.load(str(out))
    assert set(found.params) == {"embed_tokens", "layers", "norm", "value_head"}
    assert found.params["value_head"]["kernel"].dtype == jnp.float32
    flat = tree.flatten(params)
    for path, leaf in tree.flatten(found.params).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
    (tmp_path / "out" / "README.md").unlink()
    export.export_model(tmp_path / "again", found.model, found.params, tokens)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_what_a_classifier_or_a_matrix_has_no_place_for_is_refused(tmp_path, model):
    params = random_params(model)
    head = {"kernel": jnp.ones((model.config.hidden_size, 1)), "bias": jnp.ones(1)}
    with pytest.raises(ValueError, match="train it with bias=False"):
        export.export_model(tmp_path / "out", model, params | {"value_head": head}, None)
    method = peft.parallel_bottleneck()
    with pytest.raises(ValueError, match="extra: layers/slots/mlp/parallel_bottleneck .*\n.*keep the adapter beside it"):
        export.export_model(tmp_path / "out", model, method.attach(*method.init(jax.random.key(0), params)), None)
    assert not list(tmp_path.iterdir())
