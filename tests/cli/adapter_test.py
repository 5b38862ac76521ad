"""The adapter of a run appears whole, takes the place of an earlier one, and carries the tokenizer with the template that was trained."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from ftjax import models, peft
from ftjax.cli import adapter, build, export, pretrained
from ftjax.hf.tokenizer import byte_tokenizer

METHODS = [("lora_fa", {"targets": ["q_proj"], "rank": 1})]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}> {{ message['content'] }}<|endoftext|>{% endfor %}"


@pytest.fixture(scope="module")
def trained():
    model = models.build(models.preset("tiny-llama"))
    params = jax.jit(model.init)(jax.random.key(1))
    method = peft.lora_fa(**METHODS[0][1])  # the frozen factor must come along
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    frozen, trainable = method.init(jax.random.key(0), params)
    return build.Loaded(model, params, tokenizer, "tiny"), trainable, method.plan(params), frozen


def test_an_adapter_takes_the_place_of_an_earlier_one_and_leaves_nothing_else(trained, tmp_path):
    folder = epath.Path(tmp_path / "adapter")
    folder.mkdir()
    (folder / "stale").write_text("")
    assert adapter.export(folder, *trained, methods=METHODS, say=pytest.fail) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (folder / "stale").exists() and (folder / "adapter_model.safetensors").exists()


def test_an_export_that_fails_leaves_the_earlier_adapter(trained, tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / "adapter")
    folder.mkdir()
    (folder / "earlier").write_text("")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("ftjax.hf.write.write_tokenizer", full_disk)
    with pytest.raises(OSError, match="no space"):
        adapter.export(folder, *trained, methods=METHODS, say=pytest.fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "earlier"]


def test_a_folder_elsewhere_is_filled_file_by_file(trained, tmp_path):
    adapter.export(epath.Path(tmp_path / "adapter"), *trained, methods=METHODS, say=pytest.fail)
    adapter._copy(tmp_path / "adapter", epath.Path(tmp_path / "copy"))
    names = [sorted(path.name for path in (tmp_path / where).iterdir()) for where in ("adapter", "copy")]
    assert names[0] == names[1] and "tokenizer.json" in names[0]


def test_the_tokenizer_beside_an_adapter_has_the_template_that_was_trained(trained, tmp_path, capsys):
    adapter.export(epath.Path(tmp_path / "adapter"), *trained, methods=METHODS, say=pytest.fail)
    model, base = trained[0].model, byte_tokenizer()
    found = pretrained.tokenizer(tmp_path / "adapter", model, base=base)
    assert found.chat_template == TEMPLATE and found.encode("é<|im_end|>") == base.encode("é<|im_end|>")
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    assert pretrained.tokenizer(tmp_path / "adapter", model, base=base) is base
    assert pretrained.tokenizer(None, model, base=base) is base


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_used(trained, tmp_path, capsys):
    loaded, *rest = trained
    larger = byte_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(loaded.model.config.vocab_size)])
    adapter.export(
        epath.Path(tmp_path / "adapter"),
        loaded._replace(tokenizer=larger),
        *rest,
        methods=METHODS,
        say=pytest.fail,
    )
    base = byte_tokenizer()
    assert pretrained.tokenizer(tmp_path / "adapter", loaded.model, base=base) is base
    assert "has more tokens than the model" in capsys.readouterr().err


def test_what_peft_has_no_place_for_is_written_in_ftjaxs_own_form(trained, tmp_path):
    loaded, said = trained[0], []
    methods = [("lora", {"targets": ["q_proj"], "rank": 1}), ("bottleneck", {"width": 2})]
    method = peft.chain(*(peft.METHODS[name](**options) for name, options in methods))
    frozen, trainable = method.init(jax.random.key(0), loaded.params)
    adapter.export(
        epath.Path(tmp_path / "adapter"), loaded, trainable, method.plan(loaded.params), frozen, methods=methods, say=said.append
    )
    assert "not yet: the method 'bottleneck'" in said[0]
    folder = pretrained.adapter_folder(str(tmp_path))
    assert folder == tmp_path / "adapter" and pretrained.base_name(folder) == "tiny"
    assert pretrained.tokenizer(folder, loaded.model, base=byte_tokenizer()).chat_template == TEMPLATE
    attached, again = method.attach(frozen, trainable), pretrained.attach(loaded.model, loaded.params, folder)
    assert jax.tree.structure(attached) == jax.tree.structure(again)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(attached), jax.tree.leaves(again), strict=True))


def test_a_model_that_is_trained_whole_has_no_adapter(trained, tmp_path):
    loaded, method = trained[0], peft.full(".*")
    frozen, trainable = method.init(jax.random.key(0), loaded.params)
    plans = method.plan(loaded.params)
    folder = epath.Path(tmp_path / "adapter")
    assert adapter.export(folder, loaded, trainable, plans, frozen, methods=[("full", {"targets": ".*"})], say=pytest.fail) is None
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_a_stretched_model_is_put_on_the_stretched_base(base, trained, tmp_path):
    loaded, *rest = trained
    long = models.stretch(loaded.model.config, {"rope_type": "yarn", "factor": 4.0})
    for stretched, config in ((True, long), (False, loaded.model.config)):
        run = loaded._replace(model=models.build(config), stretched=stretched)
        folder = tmp_path / str(stretched)
        adapter.export(epath.Path(folder), run, *rest, methods=METHODS, say=pytest.fail)
        flags = SimpleNamespace(model=str(base.folder), adapter=[str(folder)], dtype="float32", quantize="auto", implementation="")
        assert pretrained.load(flags).model.config == export.pretrained_model(str(base.folder), folder).loaded.model.config == config
    flags.adapter = [f"{name}={tmp_path / name}" for name in ("True", "False")]
    with pytest.raises(ValueError, match="were trained with different RoPEs"):
        pretrained.load(flags)
