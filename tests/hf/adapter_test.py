"""An adapter of any methods as a plain folder: what went in comes out, and what does not fit is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, tree
from ftjax.hf import adapter

METHODS = [
    ("tokens", {"ids": [3, 5]}),
    ("bottleneck", {"targets": ["down_proj"], "width": 3}),
    ("parallel_bottleneck", {"width": 2, "layers": [1]}),
    ("lora_fa", {"targets": ["q_proj"], "rank": 2}),
    ("full", {"targets": "norm/scale"}),
    ("value_head", {"bias": False}),
]


@pytest.fixture(scope="module")
def base():
    model = models.build(models.preset("tiny-llama"))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def trained(base):
    """What a run has at its end: the arrays that a method keeps for itself among it."""
    method = peft.chain(*(peft.METHODS[name](**options) for name, options in METHODS))
    frozen, trainable = method.init(jax.random.key(2), base[1])
    random = np.random.default_rng(1)
    trainable = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), trainable)
    return method.attach(frozen, trainable), trainable, {"lora_fa": frozen["lora_fa"]}


@pytest.fixture
def folder(trained, tmp_path):
    _, trainable, own = trained
    return adapter.save_adapter(tmp_path / "a", METHODS, trainable, own=own, base_name="org/base")


def test_an_adapter_comes_back_bit_for_bit(folder, trained, base):
    found = adapter.load_adapter(folder, base[0])
    assert found.base_name == "org/base"
    got, want = tree.flatten(found.attach(base[1])), tree.flatten(trained[0])
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert jax.tree.structure(got[path]) == jax.tree.structure(leaf), path
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), got[path], leaf)
    tokens = jnp.arange(8)[None]
    np.testing.assert_array_equal(*(base[0].apply(params, tokens)[0] for params in (found.attach(base[1]), trained[0])))


def test_a_folder_is_written_whole_or_not_at_all(trained, tmp_path):
    with pytest.raises(ValueError, match="arguments of lora are not plain data"):
        adapter.save_adapter(tmp_path / "a", [("lora", {"init": lambda: None})], trained[1])
    with pytest.raises(ValueError, match="lora started from batches"):
        adapter.save_adapter(tmp_path / "a", [("lora", {"init": "eva"})], trained[1])

    class Broken:
        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        adapter.save_adapter(tmp_path / "a", METHODS, trained[1], tokenizer=Broken())
    assert not list(tmp_path.iterdir())


CONFIGS = {
    "has the format 2; this version of ftjax reads 1": {"format": 2},
    "has or lacks 'hook'": {"hook": "os.system"},
    "a list of": {"methods": {"lora": {}}},
    "as a text": {"base_model_name_or_path": 3},
    "no method 'lorra'; nearest: 'lora'": {"methods": [["lorra", {}]]},
    "bottleneck takes no 'widht'; nearest: 'width'": {"methods": [["bottleneck", {"widht": 3}]]},
    "not what the method takes": {"methods": [["bottleneck", {"width": "3"}]]},
    "no module is named 'c_attn'": {"methods": [["lora", {"targets": ["c_attn"]}]]},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_is_not_of_this_form_is_refused(message, folder, base):
    path = folder / adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | CONFIGS[message]))
    with pytest.raises(ValueError, match=message):
        adapter.load_adapter(folder, base[0])


def test_tensors_that_do_not_fit_are_listed(folder, base):
    other = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="does not fit this base model") as error:
        adapter.load_adapter(folder, other)
    where = "trainable/bottleneck/layers/mlp/down_proj/kernel/down"
    assert f"misshapen: {where} is float32 [2, 32, 3], expected float32 [3, 32, 3]" in str(error.value)
    config = json.loads((folder / adapter.CONFIG).read_text())
    (folder / adapter.CONFIG).write_text(json.dumps(config | {"methods": METHODS[1:2] + [["lora", {"targets": ["q_proj"]}]]}))
    with pytest.raises(ValueError, match="missing: trainable/lora/") as error:
        adapter.load_adapter(folder, base[0])
    assert "extra: trainable/tokens/" in str(error.value) and "extra: frozen/lora_fa" in str(error.value)


def test_a_truncated_or_absent_file_is_refused(folder, base):
    path = folder / adapter.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        adapter.load_adapter(folder, base[0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="ftjax_adapter.safetensors does not exist"):
        adapter.load_adapter(folder, base[0])
