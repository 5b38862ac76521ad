"""The teacher of a distillation: a model beside the student's, frozen, as `config.teacher` says; none where what it said is in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import data, quant, sharding
from ftjax.cli import build, objective
from ftjax.cli.build import Loaded
from ftjax.cli.config import plain
from ftjax.cli.run import Lessons
from ftjax.data.corpus import chunks
from ftjax.tree import nearest
from ftjax.types import TEACHER, Model, Params


def load(config, mesh: Mesh, student: Loaded) -> Loaded | None:
    """Return the teacher on the mesh, in its own dtype; None where the objective wants none or `config.teacher.file` speaks for it.

    Raises:
      ValueError: there is no block `teacher`; or teacher and student have different tokens and are compared by more than the order of
        their probabilities.
    """
    if not _wanted(config):
        return None
    teacher = build.model(alone(config), mesh)
    teacher = teacher._replace(params=quant.for_device(teacher.params, mesh))
    if config.teacher.divergence == "uld":
        return teacher
    check_tokens(config, student.tokenizer, teacher)
    sizes = [loaded.model.config.vocab_size for loaded in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher: it has logits of {sizes[0]:,} tokens and the student of {sizes[1]:,}; they cannot be compared.")
    return teacher


def architecture(config) -> Model | None:
    """Return the teacher without weights, as `build.architecture` finds it; None where `load` returns None."""
    return build.architecture(alone(config))[0] if _wanted(config) else None


def abstract(config, teacher: Model | None, mesh: Mesh) -> Params:
    """Return the shapes of the branch that `beside` adds, or nothing."""
    if teacher is None:
        return {}
    packer, key = build.quantizer(alone(config)), jax.random.key(0)
    params = build.shapes(alone(config), teacher)
    params = jax.eval_shape(lambda key, params: packer.init(key, params)[0], key, params) if packer else params
    return {TEACHER: sharding.abstract(params, sharding.shardings(params, mesh))}


def heard(config, lessons: Lessons, teacher: Loaded | None) -> Lessons:
    """Return the lessons whose batches hold the same texts in the teacher's own tokens and template, where these are others.

    Raises:
      ValueError: rows share texts, or the teacher's template cannot render one.
    """
    tokenizer = lessons.encoder.tokenizer
    if teacher is None or teacher.tokenizer.get_vocab() == tokenizer.get_vocab():
        return lessons
    encoder = build.encoder(config, teacher.tokenizer)

    def kept(field: str) -> Iterator[data.Example]:
        """Yield the examples of the student's sequences, in their order."""
        for source in config.data[field].values():
            for examples in chunks(data.read(plain(source), bad_rows=config.data.bad_rows), 512):
                for example, found in zip(examples, lessons.encoder.encode(examples), strict=True):
                    if not isinstance(found, data.RowError) and found.loss_mask.any():
                        yield example

    def other(loader: data.Loader | None, field: str) -> data.Loader | None:
        strict = {"bad_rows": "raise", "unsupervised": "raise"}
        return loader and loader.hearing(data.encode(kept(field), encoder, **strict))

    return lessons._replace(loader=other(lessons.loader, "sources"), held_out=other(lessons.held_out, "eval_sources"))


def beside(frozen: Params, teacher: Loaded | None) -> Params:
    """Return the frozen tree with the teacher in it, as `scoring.score_against` reads it."""
    return frozen if teacher is None else {**frozen, TEACHER: teacher.params}


def alone(config) -> ConfigDict:
    """Return the config of the teacher by itself, as `build.model` reads it."""
    chosen, found = config.teacher, config.copy_and_resolve_references().unlock()
    if chosen.quantize and chosen.quantize not in quant.METHODS:
        raise ValueError(f"teacher.quantize: there is no format {chosen.quantize!r}; nearest: {nearest(chosen.quantize, quant.METHODS)}.")
    fields = ("name", "dtype", "preset", "random")
    found.model.update({**{name: chosen[name] for name in fields}, "remat": "none", "layers": None})
    found.model.rope.rope_type = ""
    found.methods = (chosen.quantize,) if chosen.quantize else ("full",)  # whatever stores nothing in fewer bits
    found.tokenizer = chosen.tokenizer or (config.tokenizer if chosen.random else "")
    found.seed = config.seed + 1  # a random teacher is not its random student
    return found


def _wanted(config) -> bool:
    return objective.taught(config) and not objective.teacher_block(config).file


def check_tokens(config, tokenizer: Any, teacher: Loaded) -> None:
    """Refuse a teacher whose tokens are not those of the student's tokenizer.

    Raises:
      ValueError: they are others.
    """
    if teacher.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher: {config.teacher.name!r} has other tokens than the student, and both are compared token by token: "
            "take a teacher of the same family."
        )
