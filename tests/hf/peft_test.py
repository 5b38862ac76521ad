"""PEFT folders: PEFT's adapters give PEFT's logits, ours come back bitwise, and what does not fit is listed."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ftjax import models, peft
from ftjax.hf import peft as hf_peft
from ftjax.hf import peft_config

GOLDENS = Path(__file__).parents[1] / "goldens" / "peft"
TOKENS = (np.arange(10, dtype=np.int32) * 11 % 61)[None]  # third_party/peft/lora_golden.py


def logits(model, params):
    hidden, _ = model.apply(params, jnp.asarray(TOKENS))
    return np.asarray(model.unembed(model.head(params), hidden))[0]


@pytest.mark.parametrize("name", ["plain", "rich", "rslora"])
def test_an_adapter_of_peft_gives_the_logits_of_peft(base, name, key):
    model, params = base
    adapter = hf_peft.load_adapter(GOLDENS / name, model)
    frozen, fresh = adapter.method.init(key, params)
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter.trainable)
    jax.tree.map(lambda x, y: None if (x.shape, x.dtype) == (y.shape, y.dtype) else pytest.fail(f"{x} {y}"), fresh, adapter.trainable)
    golden = np.load(GOLDENS / name / "logits.npy")
    assert np.abs(logits(model, adapter.method.attach(frozen, adapter.trainable)) - golden).max() <= 1e-5 * np.abs(golden).max()
    assert np.abs(logits(model, params) - golden).max() > 0.1 * np.abs(golden).max()


def random_trained(method, params):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, jax.random.key(0), params)[1]
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)


def same(x, y):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), x, y)


METHODS = {
    "plain": lambda: peft.lora(["q_proj", "v_proj"], rank=3, alpha=6),
    "mixed": lambda: peft.lora(rank=4, alpha=8, rank_pattern={"up_proj": 2}, alpha_pattern={".*/self_attn/[qk].*": 1.5, "v_proj": 7}),
    "rslora": lambda: peft.lora(["k_proj"], rank=4, alpha=3, rslora=True, dropout=0.25),
    "outer": lambda: peft.lora(["embed_tokens", "lm_head", "o_proj"], rank=2),
    "with full": lambda: peft.chain(peft.lora(["mlp.down_proj"], rank=2), peft.full("norm/scale|layers/.*_layernorm/scale|lm_head/kernel")),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_round_trip_is_bitwise(tmp_path, base, name):
    model, params = base
    method = METHODS[name]()
    trained = random_trained(method, params)
    hf_peft.save_adapter(tmp_path / "a", model, trained, method.plan(params), base_name="org/base")
    again = hf_peft.load_adapter(tmp_path / "a", model)
    same(again.trainable, trained)
    assert again.base_name == "org/base"
    plans = [[(set(row.paths), dict(row.options)) for row in m.plan(params)] for m in (method, again.method)]
    assert plans[0] == plans[1]
    hf_peft.save_adapter(tmp_path / "b", model, again.trainable, again.method.plan(params), base_name="org/base")
    for file in (hf_peft.CONFIG, hf_peft.WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_all_fields_of_peft_are_written(tmp_path, base):
    model, params = base
    method = METHODS["plain"]()
    hf_peft.save_adapter(tmp_path / "a", model, random_trained(method, params), method.plan(params))
    ours = json.loads((tmp_path / "a" / hf_peft.CONFIG).read_text())
    theirs = json.loads((GOLDENS / "plain" / hf_peft.CONFIG).read_text())
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours.items() if k not in ("r", "lora_alpha", "base_model_name_or_path", "target_modules")} == {
        k: v for k, v in theirs.items() if k not in ("r", "lora_alpha", "base_model_name_or_path", "target_modules")
    }


@pytest.fixture
def copied(tmp_path):
    """A copy of PEFT's adapter, and how to change it."""
    shutil.copytree(GOLDENS / "plain", tmp_path / "a")

    def change(config=None, tensors=None):
        path = tmp_path / "a" / hf_peft.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        if tensors:
            path = tmp_path / "a" / hf_peft.WEIGHTS
            found = safetensors.numpy.load_file(path)
            tensors(found)
            safetensors.numpy.save_file(found, path)
        return tmp_path / "a"

    return change


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_ranks_that_differ_between_layers_are_padded(base, copied):
    def halve(tensors):
        tensors[f"{Q0}.lora_A.weight"] = tensors[f"{Q0}.lora_A.weight"][:2]
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"][:, :2].copy()

    a = hf_peft.load_adapter(GOLDENS / "plain", base[0]).trainable["lora"]["layers"]["self_attn"]["q_proj"]["kernel"]
    adapter = hf_peft.load_adapter(copied({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, halve), base[0])
    b = adapter.trainable["lora"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(b["a"], a["a"].at[0, :, 2:].set(0))
    np.testing.assert_array_equal(b["b"], a["b"].at[0, 2:].set(0).at[0, :2].multiply(2))  # alpha / 2 where the others have alpha / 4


def without(*places):
    def drop(tensors):
        for name in [name for name in tensors if any(place in name for place in places)]:
            del tensors[name]

    return drop


def test_layers_without_an_adapter_stay_without_one(base, copied):
    drop = without(".layers.0.", ".layers.2.")
    adapter = hf_peft.load_adapter(copied({"layers_to_transform": [1]}, drop), base[0])
    a = hf_peft.load_adapter(GOLDENS / "plain", base[0]).trainable["lora"]["layers"]["self_attn"]["v_proj"]["kernel"]["a"]
    np.testing.assert_array_equal(adapter.trainable["lora"]["layers"]["self_attn"]["v_proj"]["kernel"]["a"], a[1:2])
    assert adapter.options["layers"] == [1]


def test_layers_that_only_some_leaves_have_an_adapter_on_get_zeros_in_the_others(base, copied):
    targets = [f"model.layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (1, "q"), (2, "q"), (1, "v"))]
    adapter = hf_peft.load_adapter(copied({"target_modules": targets}, without("0.self_attn.v_proj", "2.self_attn.v_proj")), base[0])
    a = adapter.trainable["lora"]["layers"]["self_attn"]["v_proj"]["kernel"]["a"]
    assert [bool(layer.any()) for layer in a] == [False, True, False]


def test_all_that_does_not_fit_is_listed(base, copied):
    def spoil(tensors):
        del tensors[f"{Q0}.lora_A.weight"]
        for side in "AB":
            del tensors[f"base_model.model.model.layers.2.self_attn.v_proj.lora_{side}.weight"]
        tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"] = np.ones((4, 24), np.float32)
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = np.ones((32, 4), np.float32)

    with pytest.raises(ValueError, match="does not fit this base model or is incomplete") as error:
        hf_peft.load_adapter(copied(None, spoil), base[0])
    assert str(error.value).splitlines()[1:] == [
        "  extra: base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [4, 24]",
        "  missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [4, 24]",
        "  misshapen: base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight is [32, 4], expected [24, 4]",
        "  missing: base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight and lora_B.weight",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_qalora": True}, "not yet: use_qalora=True"),
        ({"peft_type": "LORAX"}, "not yet: peft_type='LORAX'; nearest: 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "not yet: init_lora_weights='pissa_niter_4'"),
        ({"target_parameters": ["x"], "lora_bias": True}, "not yet: lora_bias=True; not yet: target_parameters"),
        ({"r": 0}, "r=0 .* not a rank"),
        ({"rank_pattern": [1]}, "are objects"),
        ({"alpha_pattern": {"q_proj": "big"}}, "is not a number"),
        ({"lora_dropout": 2}, "lora_dropout=2 is not a probability"),
        ({"target_modules": "(*"}, r"'\(\*' is not a regular expression"),
        ({"target_modules": None}, "target_modules=None names no module"),
        ({"r": 5}, r"lora_A.weight is \[4, 24\], expected \[5, 24\]"),
    ],
)
def test_what_we_cannot_compute_is_refused(base, copied, config, message):
    with pytest.raises(ValueError, match=message):
        hf_peft.load_adapter(copied(config), base[0])


def test_all_biases_of_a_model_without_any_are_none(base, copied):
    assert hf_peft.load_adapter(copied({"bias": "all"}), base[0]).trainable.keys() == {"lora"}


def test_an_adapter_of_other_modules_is_refused(base, copied):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("_proj", "_mystery")] = tensors.pop(name)

    with pytest.raises(ValueError, match="there is no lora_A or lora_B of a module of this model"):
        hf_peft.load_adapter(copied({"target_modules": ["q_mystery", "v_mystery"]}, rename), base[0])


def test_unknown_fields_are_told_and_ignored(base, copied, caplog):
    with caplog.at_level(logging.WARNING):
        hf_peft.load_adapter(copied({"from_the_future": 1}), base[0])
    assert "from_the_future" in caplog.text


def test_a_damaged_or_missing_file_is_named(base, copied):
    path = copied() / hf_peft.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="adapter_model.safetensors is not a complete safetensors file"):
        hf_peft.load_adapter(path.parent, base[0])
    path.rename(path.with_name("adapter_model.bin"))
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle"):
        hf_peft.load_adapter(path.parent, base[0])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: peft.chain(peft.lora(rank=2), peft.lora(["lm_head"], rank=2, name="other")), "not yet: 2 methods with a PEFT format"),
        (lambda: peft.chain(peft.lora(rank=2), peft.full("layers/.*norm/scale", layers="last 1")), "not yet: 'full' on some of the layers"),
        (lambda: peft.full("norm/scale"), "not yet: 0 methods with a PEFT format"),
    ],
)
def test_what_peft_has_no_place_for_is_not_written(tmp_path, base, method, message):
    model, params = base
    method = method()
    with pytest.raises(ValueError, match=message):
        hf_peft.save_adapter(tmp_path / "a", model, random_trained(method, params), method.plan(params))
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_a_tied_embedding_is_refused(tmp_path):
    model = models.build(models.preset("tiny-llama"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    method = peft.lora(["embed_tokens"], rank=2)
    with pytest.raises(ValueError, match="embedding that is tied to the head"):
        hf_peft.save_adapter(tmp_path / "a", model, random_trained(method, params), method.plan(params))


def test_half_a_module_is_refused(tmp_path):
    model = models.build(models.preset("tiny-qwen2"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    method = peft.chain(peft.lora(["up_proj"], rank=2), peft.full("layers/self_attn/q_proj/bias"))
    with pytest.raises(ValueError, match="PEFT saves whole modules: train 'layers/self_attn/q_proj/kernel' too"):
        hf_peft.save_adapter(tmp_path / "a", model, random_trained(method, params), method.plan(params))


@pytest.mark.parametrize(
    ("chosen", "rule", "names"),
    [
        (["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], peft_config.ends_at_dot, ["q_proj"]),
        (["model.layers.0.mlp.q_proj"], peft_config.ends_at_dot, ["mlp.q_proj"]),
        (["model.norm"], str.endswith, ["model.norm"]),  # "norm" would select q_norm too
        (["model.norm"], peft_config.ends_at_dot, ["norm"]),
    ],
)
def test_a_name_is_as_short_as_it_can_be(chosen, rule, names):
    modules = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "q_norm")]
    modules = [*modules, "model.norm", *(["model.layers.0.mlp.q_proj"] if "mlp" in chosen[0] else [])]
    assert peft_config.shortest_names(chosen, modules, rule) == names
