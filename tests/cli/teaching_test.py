"""A teacher beside its student: the same model says the same, fewer layers say something else, and what cannot be compared is refused."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from ftjax import sharding
from ftjax.cli import build, objective, teaching
from ftjax.cli import config as configs
from ftjax.cli.run import Lessons
from ftjax.hf import depth, folder
from ftjax.types import TEACHER

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "distill_smollm2.py") + ":smoke"
MESH = sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def config(base):
    """The student is the model in a folder, and so is the teacher."""
    config = configs.load(CONFIG)
    for block in (config.model, config.teacher):
        block.update({"name": str(base.folder), "random": False})
    config.model.layers = None
    config.data.accumulation = 1
    return config


def evaluation(config) -> dict[str, float]:
    loaded = build.model(config, MESH)
    teacher = teaching.load(config, MESH, loaded)
    method = build.method(config)
    frozen, trainable = method.init(jax.random.key(0), loaded.params)
    batch = build.loader(config, build.encoder(config, loaded.tokenizer), MESH, held_out=True)[0].batch(0)
    step = objective.eval_step(config, loaded.model, method, MESH, teacher=teacher.model)
    return {name: mean.value() for name, mean in step(trainable, teaching.beside(frozen, teacher), batch).items()}


def test_a_student_that_is_its_teacher_has_nothing_to_learn(config):
    found = evaluation(config)
    assert abs(found["divergence"]) < 1e-6 and found["agreement"] == 1 and found["nll"] > 1


def test_a_student_of_fewer_layers_and_a_rounded_teacher_say_something_else(config):
    config.model.layers, config.teacher.quantize = (1,), "int4"
    found = evaluation(config)
    assert found["divergence"] > 1e-5
    assert found["loss"] == pytest.approx(found["divergence"] + config.loss.nll_coef * found["nll"], rel=1e-6)


def test_layers_are_those_of_the_file_in_the_order_asked_for(config, base):
    config.model.layers = (1, 0, 1)
    loaded = build.model(config, MESH)
    kernel = base.params["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(loaded.params["layers"]["self_attn"]["q_proj"]["kernel"], kernel[np.array([1, 0, 1])])
    assert loaded.model.config.num_hidden_layers == 3 and loaded.name.endswith("(layers 1, 0, 1)")
    checkpoint = folder.read(base.folder)
    kinds = checkpoint._replace(config=checkpoint.config | {"layer_types": ["sliding_attention", "full_attention"]})
    assert depth.with_layers(kinds, (1,)).config["layer_types"] == ["full_attention"]
    for wrong in ((), (2,), (-1,), ("0",)):
        with pytest.raises(ValueError, match="layers are indices from 0 to 1"):
            depth.with_layers(checkpoint, wrong)


def test_shapes_are_those_of_what_is_loaded(config):
    config.teacher.quantize = "int8"
    teacher = teaching.load(config, MESH, build.model(config, MESH))
    shapes = teaching.abstract(config, teaching.architecture(config), MESH)[TEACHER]
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), teacher.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == expected


def test_a_teacher_with_other_tokens_hears_the_same_texts_in_its_own(config):
    student = build.model(config, MESH)
    student.tokenizer.add_tokens(["the"])
    with pytest.raises(ValueError, match="has other tokens than the student"):
        teaching.load(config, MESH, student)
    config.teacher.divergence, config.data.packing = "uld", "none"
    teacher = teaching.load(config, MESH, student)
    encoder = build.encoder(config, student.tokenizer)
    lessons = Lessons(encoder, *(build.loader(config, encoder, MESH, held_out=held_out)[0] for held_out in (False, True)))
    for loader in teaching.heard(config, lessons, teacher)[1:]:
        batch = loader.batch(1)
        for at in range(len(batch.tokens)):
            ours, theirs = (one.tokens[at][one.segment_ids[at] > 0] for one in (batch, batch.teacher))
            assert student.tokenizer.decode(ours) == teacher.tokenizer.decode(theirs)
            assert len(ours) < len(theirs)  # of which every "the" is three tokens
            ours, theirs = (one.tokens[at][one.loss_mask[at] > 0] for one in (batch, batch.teacher))
            assert student.tokenizer.decode(ours) == teacher.tokenizer.decode(theirs)
    method = build.method(config)
    frozen, trainable = method.init(jax.random.key(0), student.params)
    step = objective.eval_step(config, student.model, method, MESH, teacher=teacher.model)
    batch = dataclasses.replace(batch, tokens=np.minimum(batch.tokens, 259))  # the model has no row for what was added
    found = step(trainable, teaching.beside(frozen, teacher), build.on_mesh(batch, MESH))
    assert 0 < found["divergence"].value() < 2 and "agreement" not in found
    with pytest.raises(ValueError, match="set packing to 'none'"):
        dataclasses.replace(lessons.loader, packing="best_fit").hearing(lessons.loader.sequences)


WRONG = {
    ("divergence", "jds"): r"teacher\.divergence: there is no 'jds'; nearest: 'jsd'",
    ("temperature", 0.0): r"teacher\.temperature: above 0, not 0",
    ("file", "said"): r"teacher\.file: of stored tokens the forward KL is known",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_teacher_that_cannot_be_meant_is_refused_before_anything_is_loaded(field, config):
    config.teacher.update(dict([field]))
    with pytest.raises(ValueError, match=WRONG[field]):
        objective.check_best_metric(config)


def test_a_config_without_a_teacher_says_where_one_comes_from():
    config = configs.load(str(pathlib.Path(CONFIG).parent / "quickstart.py") + ":smoke")
    config.algorithm = "distill"
    with pytest.raises(ValueError, match=r"needs a block config\.teacher; begin the config with base\.distilled"):
        objective.check_best_metric(config)
