"""What a teacher said, in a file: learning from it is learning from the teacher, and what has changed since is refused."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors import safe_open

from ftjax import sharding
from ftjax.cli import abstract, build, main, objective, said, teaching
from ftjax.cli import config as configs
from ftjax.cli.run import Lessons

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "distill_smollm2.py") + ":smoke"
MESH = sharding.make_mesh(devices=jax.devices()[:1])
VOCAB = 260


@pytest.fixture(scope="module")
def file(tmp_path_factory, compiled):
    """All that the random teacher of the smoke config says, its whole vocabulary."""
    path = tmp_path_factory.mktemp("teach") / "said.safetensors"
    assert main.main(["teach", f"--config={CONFIG}", f"--output={path}", f"--top_k={VOCAB}", f"--compile_cache={compiled}"]) == 0
    return path


@pytest.fixture
def config(file):
    config = build.resolved(configs.load(CONFIG))
    config.teacher.update({"file": str(file), "divergence": "forward_kl"})
    return config


def lessons(config) -> Lessons:
    encoder = build.encoder(config, build.tokenizer(config))
    return Lessons(encoder, *(build.loader(config, encoder, MESH, held_out=held_out)[0] for held_out in (False, True)))


def test_all_that_was_said_teaches_what_the_teacher_teaches(config):
    found, student, method = {}, build.model(config, MESH), build.method(config)
    frozen, trainable = method.init(jax.random.key(0), student.params)
    batch = said.told(config, lessons(config)).loader.batch(1)
    for path in (config.teacher.file, ""):
        config.teacher.file = path
        teacher = teaching.load(config, MESH, student)
        step = objective.eval_step(config, student.model, method, MESH, teacher=teacher and teacher.model)
        found[bool(teacher)] = {name: mean.value() for name, mean in step(trainable, teaching.beside(frozen, teacher), batch).items()}
    assert found[False]["divergence"] == pytest.approx(found[True]["divergence"], rel=1e-4) and found[True]["divergence"] > 1e-3
    assert found[False]["agreement"] == found[True]["agreement"]


def test_it_is_said_of_the_places_that_count_and_of_no_other(config):
    told = said.told(config, lessons(config))
    for loader in (told.loader, told.held_out):
        batch = loader.batch(0)
        counted = batch.loss_mask > 0
        np.testing.assert_allclose(np.exp(batch.teacher_logps).sum(-1)[counted], 1, rtol=1e-4)
        assert not batch.teacher_ids[~counted].any() and not batch.teacher_logps[~counted].any()
        assert all(len(set(ids)) == VOCAB for ids in batch.teacher_ids[counted])
    shapes, batch = abstract.batch(MESH, config), told.loader.batch(0)
    for name in ("teacher_ids", "teacher_logps"):
        expected, got = getattr(shapes, name), getattr(batch, name)
        assert (expected.shape, expected.dtype) == (got.shape, got.dtype) == ((4, 128, VOCAB), got.dtype)


STALE = {
    "data.template": ("none", r"not of data\.sources as it is now: rows, template, tokenizer or max_tokens are others"),
    "data.packing": ("wrapped", r"data\.packing='wrapped' cuts texts"),
    "teacher.name": ("another", r"what another teacher said \(name: 'smollm2-135m-instruct' there, 'another' here\)"),
    "teacher.file": (CONFIG, r"cannot be read"),
}


@pytest.mark.parametrize("field", STALE)
def test_what_is_stale_is_refused(field, config):
    config.update_from_flattened_dict({field: STALE[field][0]})
    with pytest.raises(ValueError, match=STALE[field][1]):
        said.told(config, lessons(config))


def test_the_file_says_whose_words_they_are(file, capsys):
    with safe_open(file, framework="numpy") as opened:
        about = opened.metadata()
    assert len(about["parameters"]) == 64 and about["sources/sha256"] != about["eval_sources/sha256"]
    assert main.main(["teach", f"--config={CONFIG}"]) == 1
    assert "--output=FILE.safetensors is needed" in capsys.readouterr().err
