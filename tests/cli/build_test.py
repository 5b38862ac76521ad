"""A config that cannot be built says which field is wrong."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict

from ftjax import data, models, sharding
from ftjax.cli import build, measure, objective
from ftjax.cli import config as configs
from ftjax.train import init_state
from ftjax.types import Batch, Mean

QUICKSTART = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"


@pytest.fixture
def config():
    return configs.load(QUICKSTART)  # four rows


@pytest.fixture
def flags_of():
    """`flags_of(*argv)`: what a command line is read as."""

    def parse(*argv):
        flags = absl_flags.FlagValues()
        configs.define(flags, argv)
        flags(["ftjax", *argv])
        return flags

    return parse


def test_micro_batches_that_do_not_divide_over_the_mesh_are_refused(config):
    config.data.accumulation = 2
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=r"data.batch_size: 4 rows .*data.accumulation=2 × mesh.data=2 × mesh.fsdp=2 = 8"):
        build.loader(config, None, mesh)
    encoder = build.encoder(config, build.tokenizer(config))
    assert build.loader(config, encoder, mesh, held_out=True)[0].rows == (0, 4)  # an evaluation has no micro-batches
    config.data.accumulation = 1
    assert build.loader(config, encoder, mesh)[0].rows == (0, 4)


def test_a_stored_config_names_the_dtype(config):
    config.model.dtype = "auto"
    stored = build.resolved(config)
    assert stored.model.dtype == build.dtype("auto") in ("float32", "bfloat16") and config.model.dtype == "auto"
    assert configs.as_json(stored) == {
        **configs.as_json(config),
        "model": {**configs.as_json(config)["model"], "dtype": stored.model.dtype},
    }


def test_a_stored_config_holds_the_ids_of_the_text_that_a_prompt_starts_as(config):
    config.methods, config.prompt_tuning.init = ("prompt_tuning",), "text:Hi!"
    stored = build.resolved(config)
    assert stored.prompt_tuning.init == tuple(b"Hi!") and config.prompt_tuning.init == "text:Hi!"
    params = {"embed_tokens": {"kernel": jnp.arange(260.0)[:, None]}}
    prompt = build.method(stored).init(jax.random.key(0), params)[1]["prompt_tuning"]["prompt"]["embedding"]
    assert prompt[:4, 0].tolist() == [*b"Hi!", *b"H"]


FLAGS = {
    "full": (["--config.full.targets=['q_proj']", "--config.full.layers=last 1"], (1, 32, 32)),
    "p_tuning": (["--config.p_tuning.hidden_size=None", "--config.p_tuning.num_tokens=3"], (3, 32)),
    "lora": (["--config.lora.targets=['q_proj']", "--config.lora.init=pissa_niter_7"], (2, 32, 4)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_option_of_a_method_has_a_flag(name, flags_of):
    argv, shape = FLAGS[name]
    config = flags_of(f"--config={QUICKSTART}", f"--config.methods=('{name}',)", *argv).config
    trainable = jax.eval_shape(lambda key: build.method(config).init(key, build.architecture(config)[0].init(key))[1], jax.random.key(0))
    leaves = jax.tree.leaves(trainable)
    assert leaves[0].shape == shape and len(leaves) == (2 if name == "lora" else 1)


def test_held_out_examples_without_an_answer_are_refused_by_name(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    config = ConfigDict(
        {"algorithm": "sft", "data": {"bad_rows": "raise", "eval_sources": {"texts": {"path": str(tmp_path / "texts.jsonl")}}}}
    )
    assert build.held_out_examples(config, 0) == []
    with pytest.raises(ValueError, match=r"eval\.generate\.examples: no row of data.eval_sources \(texts\) has an answer"):
        build.held_out_examples(config, 1)


@pytest.mark.parametrize("template", ["auto", "none", "chatml", "{{ messages[0]['content'] }}|{{ messages[-1]['content'] }}<|endoftext|>"])
def test_the_tokenizer_carries_the_template_that_is_trained(config, template):
    before = build.tokenizer(config).chat_template
    config.data.template = template
    tokenizer = build.tokenizer(config)
    trained = build.encoder(config, tokenizer).template
    assert tokenizer.chat_template == (before if template in ("auto", "none") else trained.source)


def test_the_tokenizer_carries_the_template_variables_that_are_trained(config):
    config.data.template = "{{ messages[0].content }}{% if thinking %}<think>{% endif %}{% if add_generation_prompt %}:{% endif %}"
    config.data.template_variables = {"thinking": True}
    tokenizer = build.tokenizer(config)
    prompt = build.encoder(config, tokenizer).prompt(data.Example(({"role": "user", "content": "a"},)))
    assert (
        tokenizer.decode(prompt)
        == "a<think>:"
        == data.ChatTemplate(tokenizer.chat_template).render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_best_metric_that_no_evaluation_has_is_refused(config, smoothing):
    config.loss.label_smoothing = smoothing
    for config.checkpoint.best_metric in ("loss", "nll", "accuracy", "perplexity"):
        objective.check_best_metric(config)
    config.checkpoint.best_metric = "acuracy"
    with pytest.raises(ValueError, match="best_metric: there is no 'acuracy'; the evaluation has loss, accuracy, nll, perplexity"):
        objective.check_best_metric(config)


def test_what_has_no_likelihood_has_no_perplexity(config):
    config.loss = ConfigDict()
    config.checkpoint.best_metric = "perplexity"
    for config.algorithm in ("dpo", "kto"):
        objective.check_best_metric(config)
    config.algorithm = "reward"
    with pytest.raises(ValueError, match="there is no 'perplexity'"):
        objective.check_best_metric(config)
    one = Mean(np.float32(3), np.float32(2))
    assert measure.evaluate(lambda batch: {"loss": one}, [None]) == {"loss": 1.5}
    assert measure.evaluate(lambda batch: {"loss": one, "nll": one}, [None])["perplexity"] == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize(("rule", "b2"), [("adamw", 0.999), ("lion", 0.99)])
def test_the_second_decay_is_the_rules_own_unless_it_is_set(config, rule, b2):
    config.optimizer.update({"name": rule, "clip_norm": 0.0})
    left = build.optimizer(config)
    config.optimizer.b2 = b2
    right = build.optimizer(config)
    config.optimizer.b2 = 0.5
    other = build.optimizer(config)
    params = {"w": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):  # as in train.py
        states = [one.update({"w": jnp.ones(2)}, one.init(params), params)[1] for one in (left, right, other)]
    leaves = [[float(x.sum()) for x in jax.tree.leaves(state)] for state in states]
    assert leaves[0] == leaves[1] != leaves[2]


def test_a_rope_of_the_config_stretches_the_model(config):
    config.model.rope.update({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0})
    model, shape = build.architecture(config)
    assert model.config == shape == models.stretch(models.preset("tiny-llama"), {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0})
    assert build.model(config, build.mesh(config)).stretched
    config.model.rope.rope_type = "dynamic"
    with pytest.raises(ValueError, match=r"model\.rope: .*'dynamic' is not supported"):
        build.architecture(config)
    config.model.rope.rope_type = ""
    with pytest.raises(ValueError, match=r"model\.rope: beta_fast says nothing without a rope_type"):
        build.architecture(config)


def test_training_attends_in_groups_and_evaluation_to_everything(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, method, rule = build.architecture(config)[0], build.method(config), build.optimizer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    ones = jnp.ones((2, 16), jnp.int32)
    positions = ones * jnp.arange(16)[None]
    batch = Batch(jax.random.randint(jax.random.key(1), (2, 16), 0, 260), (positions > 0).astype(jnp.float32), positions, ones)

    def losses():
        frozen, trainable = method.init(jax.random.key(0), params)
        state = init_state(jax.random.key(0), trainable, method, rule)
        evaluated = objective.eval_step(config, model, method, mesh)(trainable, frozen, batch)["loss"].value()
        trained = objective.train_step(config, model, method, rule, mesh, state)(state, frozen, batch)[1]["loss"].value()
        return trained, evaluated

    config.data.accumulation = 1
    full = losses()
    config.model.group_tokens = 4
    grouped = losses()
    assert full[0] == pytest.approx(full[1], rel=1e-6) and grouped[1] == full[1] and abs(grouped[0] - full[0]) > 1e-4
    config.model.group_tokens = 5
    with pytest.raises(ValueError, match=r"model\.group_tokens: .* positive even number"):
        objective.in_training(config, model)
