"""A reward model in PEFT's form: their classifier's logit is our value, ours come back bitwise, other heads are refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ftjax import peft, tree
from ftjax.hf import export, tokenizer
from ftjax.hf import peft as hf_peft

GOLDEN = Path(__file__).parents[1] / "goldens" / "peft" / "classifier"  # third_party/peft/check_reward.py
TOKENS = (np.arange(10, dtype=np.int32) * 11 % 61)[None]


def test_a_classifier_of_peft_gives_the_logit_of_peft(base):
    model, params = base
    adapter = hf_peft.load_adapter(GOLDEN, model)
    params = adapter.method.attach(adapter.join(params), adapter.trainable)
    hidden, _ = model.apply({name: branch for name, branch in params.items() if name != "value_head"}, jnp.asarray(TOKENS))
    value = hidden[0, -1] @ params["value_head"]["kernel"][:, 0]
    np.testing.assert_allclose(value, np.load(GOLDEN / "logits.npy")[0], rtol=1e-4)


def test_a_lora_and_a_head_come_back_bitwise_and_merge_into_a_classifier(tmp_path, base):
    model, params = base
    method = peft.chain(peft.lora(["q_proj"], rank=2), peft.full("norm/scale"), peft.value_head(init="normal", bias=False))
    _, trained = method.init(jax.random.key(0), params)
    hf_peft.save_adapter(tmp_path / "a", model, trained, method.plan(params))
    config = json.loads((tmp_path / "a" / hf_peft.CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["model.norm", "classifier", "score"]
    again = hf_peft.load_adapter(tmp_path / "a", model)
    expected, found = (tree.flatten(x) for x in (trained, again.trainable))
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(leaf, found[path], err_msg=path)
    merged = export.export_model(tmp_path / "m", model, again.method.attach(again.join(params), again.trainable), None)
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_a_head_that_peft_has_no_place_for_is_refused(tmp_path, base):
    model, params = base
    method = peft.chain(peft.lora(["q_proj"], rank=2), peft.value_head())
    _, trained = method.init(jax.random.key(0), params)
    hf_peft.save_adapter(tmp_path / "zero", model, trained, method.plan(params))  # a bias that never moved is none
    trained["value_head"]["bias"] += 1
    with pytest.raises(ValueError, match="train it with bias=False"):
        hf_peft.save_adapter(tmp_path / "one", model, trained, method.plan(params))
    shutil.copytree(GOLDEN, tmp_path / "theirs")
    wide = {"base_model.model.score.weight": np.zeros((3, model.config.hidden_size), np.float32)}
    save_file(wide, tmp_path / "theirs" / hf_peft.WEIGHTS)
    with pytest.raises(ValueError, match=r"score.weight is \[3, \d+\], expected \[1, \d+\]: of classifiers those of one label"):
        hf_peft.load_adapter(tmp_path / "theirs", model)


def test_the_padding_of_a_classifier_ends_no_text(tmp_path, base):
    model, params = base
    tokens = tokenizer.byte_tokenizer()
    tokens.pad_token = tokens.eos_token
    params = {**params, "value_head": {"kernel": jnp.zeros((model.config.hidden_size, 1))}}
    out = export.export_model(tmp_path / "out", model, params, tokens)
    found = tokenizer.load(out)
    assert found.pad_token_id not in (None, tokens.eos_token_id) and tokens.pad_token == tokens.eos_token
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == found.pad_token_id
