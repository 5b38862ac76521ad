"""From a config to objects: the only place where strings select. Errors name the field of the config."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import data, hub, losses, models, optimizers, peft, quant, sharding
from ftjax.cli import environments, measure, objective, rollouts
from ftjax.cli.config import named, plain
from ftjax.hf import depth
from ftjax.hf import load as hf_load
from ftjax.hf import tokenizer as hf_tokenizer
from ftjax.peft import inits
from ftjax.tree import nearest
from ftjax.types import Model, Params, TrainState, Transform

METHODS = peft.METHODS | quant.METHODS
"""What `config.methods` may name."""
TEXT = "text:"
"""Before the words that a prompt starts as, in `config.prompt_tuning.init`."""


class Loaded(NamedTuple):
    """A model with its weights and its tokenizer."""

    model: Model
    params: Params
    tokenizer: Any
    name: str
    stretched: bool = False
    """Whether `config.model.rope` made its RoPE another than the base's."""


def mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `config.mesh` over all devices; where all four sizes are given, over just so many of a single process."""
    sizes = {name: int(config.mesh[name]) for name in sharding.AXES}
    product = math.prod(sizes.values())
    some = product > 0 and jax.process_count() == 1
    devices = jax.devices() if devices is None else devices
    return sharding.make_mesh(**sizes, devices=devices[:product] if some else devices)


def dtype(name: str) -> str:
    """Return the dtype that "auto" stands for: bfloat16, on a CPU too, where products are faster in it (see `ftjax.kernels.product`)."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"model.dtype: there is no {name!r}; nearest: {nearest(name, ('auto', 'float32', 'bfloat16'))}.")
    return "bfloat16" if name == "auto" else name


def resolved(config) -> ConfigDict:
    """Return a copy to be stored: "auto" has become a dtype, since another JAX may choose another, a prompt's text its ids.

    A loss on what the policy writes has the name of the loss: "online_dpo" is "dpo" with a block `rollout`.
    """
    config = config.copy_and_resolve_references()
    if "rollout" in config and (name := config.algorithm.removeprefix("online_")) in losses.LOSSES:
        config.algorithm = name
    for block in (config.model, *([config.teacher] if "teacher" in config else [])):
        block.dtype = dtype(block.dtype)
    start = config.prompt_tuning.init
    if "prompt_tuning" in config.methods and isinstance(start, str) and start.startswith(TEXT):
        with config.ignore_type():
            config.prompt_tuning.init = tuple(tokenizer(config).encode(start.removeprefix(TEXT), add_special_tokens=False))
    return config


def architecture(config) -> tuple[Model, models.Config]:
    """Return the model of a config, without weights: that of `model.name` where `origin` knows it, else of `model.preset`."""
    where = origin(config)
    if isinstance(where, str):
        shape = named("model.preset", models.preset, where)
    else:
        shape = hf_load.config_of(hf_load.described(where))
    if layers := _layers(config):
        if not set(layers) <= set(range(shape.num_hidden_layers)):
            raise ValueError(f"model.layers: indices from 0 to {shape.num_hidden_layers - 1} are expected, not {list(layers)}.")
        shape = dataclasses.replace(shape, num_hidden_layers=len(layers), layer_types=tuple(shape.layer_types[at] for at in layers))
    shape = stretch(config, dataclasses.replace(shape, dtype=dtype(config.model.dtype)))
    return models.build(shape, remat=config.model.remat), shape


def origin(config) -> Path | str:
    """Return where the architecture is told without fetching anything: the path of `model.name`, or the name of a preset."""
    if config.model.random:
        return config.model.preset
    if config.model.name.lower() in hub.WHEELS:
        return hub.WHEELS[config.model.name.lower()].preset
    return hub.here(config.model.name) or config.model.preset


def shapes(config, model: Model) -> Params:
    """Return the shapes of the parameters of `architecture`: where they are files of this machine those in there, for some are packed."""
    where, layers = origin(config), _layers(config)
    if isinstance(where, str):
        return jax.eval_shape(model.init, jax.random.key(0))
    found = hf_load.described(where)
    found = found if layers is None else depth.with_layers(found, layers)
    return hf_load.shapes(found, model, dtype=dtype(config.model.dtype))


def stretch(config, shape: models.Config) -> models.Config:
    """Return the architecture with the RoPE of `config.model.rope`, or as it is where that is empty."""
    options = {name: value for name, value in plain(config.model.rope).items() if value not in (None, "")}
    if options and "rope_type" not in options:
        raise ValueError(f"model.rope: {sorted(options)[0]} says nothing without a rope_type, such as 'linear' or 'yarn'.")
    return named("model.rope", partial(models.stretch, shape), options) if options else shape


def model(config, mesh: Mesh, *, packed: bool = True) -> Loaded:
    """Return the model with its weights on the mesh; random ones where `config.model.random` says so.

    Those that a quantiser among the methods names are packed, unless not wanted so.
    """
    stretched, packer = bool(config.model.rope.rope_type), quantizer(config) if packed else None
    if config.model.random:
        built, _ = architecture(config)
        init = built.init if packer is None else lambda key: packer.init(key, built.init(key))[0]
        params = sharding.init_on_mesh(init, jax.random.key(config.seed), mesh=mesh)
        return Loaded(built, params, tokenizer(config), f"{config.model.preset} (random)", stretched)
    options = {"dtype": dtype(config.model.dtype), "remat": config.model.remat, "place": sharding.placement(mesh), "quantizer": packer}
    layers = _layers(config)
    found = hf_load.load(config.model.name, **options, change=partial(stretch, config), layers=layers)
    chosen = tokenizer(config) if config.tokenizer else _with_template(config, found.tokenizer)
    name = config.model.name if layers is None else f"{config.model.name} (layers {', '.join(map(str, layers))})"
    return Loaded(found.model, found.params, chosen, name, stretched)


def _layers(config) -> tuple[int, ...] | None:
    """Return the layers of the model that are kept, or None for all; configs of older runs have no such field."""
    layers = config.model.get("layers")
    return None if layers is None else tuple(layers)


def tokenizer(config) -> Any:
    """Return the tokenizer of `config.tokenizer`, or the model's, with the chat template that is trained."""
    if config.tokenizer == "bytes":
        return _with_template(config, hf_tokenizer.byte_tokenizer())
    if not config.tokenizer and config.model.random:
        raise ValueError("tokenizer: a model with random weights has none of its own; set tokenizer to a folder, a model or 'bytes'.")
    return _with_template(config, hf_tokenizer.load(hub.find(config.tokenizer or config.model.name)))


def _with_template(config, tokenizer: Any) -> Any:
    """Return the tokenizer with the template of `config.data` as its own, so that who gets it asks the model as it was trained."""
    if config.data.template not in ("auto", "none") or config.data.template_variables:
        tokenizer.chat_template = encoder(config, tokenizer).template.source
    return tokenizer


def method(config, statistics: Mapping[str, Mapping[str, Any]] = {}) -> Transform:
    """Return the chain of `config.methods`, each with the block of its name.

    `statistics`, of `ftjax.cli.beginning`, are for those whose start needs it; shapes will do where nothing is started.
    """
    starts = {name: calibrated(config, config[name].init, found) for name, found in statistics.items()}
    options = ((name, block | {"init": starts[name]} if name in starts else block) for name, block in methods(config))
    chosen = peft.chain(*(METHODS[name](**block) for name, block in options))
    wanted = objective.needs(config)
    live = wanted.reference and (wanted.baseline or not objective.asks_once(config))  # of mismatched rows nothing is known before
    live = live and "reference" not in objective.remembers(config)
    return peft.anchored(chosen) if live or rollouts.referred(config) else chosen


def calibrated(config, init: str, statistics: Mapping[str, Any]) -> inits.OfPath:
    """Return an init of `inits.CALIBRATED` with its options in `config.calibration`, which configs of older runs have not."""
    make = partial(inits.CALIBRATED[init], statistics)
    return named(f"calibration.{init}", lambda options: make(**options), plain(config.calibration.get(init, {})))


def quantizer(config) -> Transform | None:
    """Return the chain of those of `config.methods` that store the base in fewer bits; None where there is none."""
    found = [quant.METHODS[name](**options) for name, options in methods(config) if name in quant.METHODS]
    return peft.chain(*found) if found else None


def methods(config) -> list[tuple[str, dict[str, Any]]]:
    """Return the methods of a config with their arguments."""
    if not config.methods:
        raise ValueError("methods: name at least one, as in --config.methods=lora, or several with commas between them.")
    return [(name, _options(name, config)) for name in config.methods]


def _options(name: str, config) -> dict[str, Any]:
    if name not in METHODS:
        raise ValueError(
            f"methods: there is no method {name!r}; nearest: {nearest(name, METHODS)}. Several have commas between them: nf4,lora."
        )
    if name not in config:
        raise ValueError(f"methods: {name!r} needs a block config.{name} with its options.")
    options = plain(config[name])
    if "steps" in options and options["steps"] is None:
        options["steps"] = config.steps
    return options


def optimizer(config) -> optax.GradientTransformation:
    """Return the optimiser and schedule of `config.optimizer`."""
    options = plain(config.optimizer)
    return optimizers.build(
        options.pop("name"),
        steps=config.steps,
        schedule_name=options.pop("schedule"),
        clip_norm=options.pop("clip_norm") or None,
        groups=tuple(map(tuple, options.pop("groups"))),
        **options,
    )


def learning_rate(config) -> optax.Schedule:
    """Return the learning rate by step, for the logs."""
    names = ("learning_rate", "warmup_steps", "final_fraction", "decay_steps")
    return optimizers.schedule(config.optimizer.schedule, steps=config.steps, **{name: config.optimizer[name] for name in names})


def encoder(config, tokenizer: Any) -> data.Encoder:
    """Return how examples become tokens."""
    fields = ("max_tokens", "template", "train_on", "template_variables")
    return data.make_encoder(tokenizer, **{name: config.data[name] for name in fields})


def loader(config, encoder: data.Encoder, mesh: Mesh, *, held_out: bool = False) -> tuple[Any, dict[str, data.Report]]:
    """Return this process's share of the batches, or all prompts of rollouts, and what became of the rows of each source.

    Held-out data is shuffled too, always in one way: packing puts long examples first, and a few batches should speak for all.
    """
    field = "eval_sources" if held_out else "sources"
    sources = config.data[field]
    if not sources:
        raise ValueError(f"data.{field}: no source is named; add one as base.source(PATH).")
    check_rows(config, mesh, accumulation=1 if held_out else config.data.accumulation)
    specs = {name: plain(source) for name, source in sources.items()}
    options = {"batch_size": config.data.batch_size, "seed": config.seed, "shuffle": held_out or config.data.shuffle}
    options["bad_rows"], wanted = config.data.bad_rows, objective.needs(config)
    options["packing"] = config.data.packing
    if rollouts.used(config):
        del options["packing"], options["batch_size"]
        options |= {"count": rollouts.samples(config) if held_out else rollouts.prompts(config), "max_tokens": config.rollout.max_tokens}
        return data.load_prompts(specs, encoder, change=environments.opened(config, encoder), **options)
    if wanted.data == "messages":
        found, reports = data.load(specs, encoder, **options)
    elif wanted.data in data.KINDS:
        options |= {"mismatched": wanted.baseline, "both_classes": wanted.both_classes}
        found, reports = data.load_judged(specs, encoder, wanted=wanted.data, **options)
    else:
        raise ValueError(f"algorithm: {config.algorithm!r} learns from {wanted.data}, not read by `ftjax train` yet; use it from Python.")
    return found.shard(*sharding.batch_share(mesh)), reports


def check_rows(config, mesh: Mesh, *, accumulation: int) -> None:
    """Refuse micro-batches that do not divide over the mesh: every device would then compute all of their rows."""
    parts, rows = accumulation * sharding.row_parts(mesh), rollouts.rows(config)
    if rows % parts:
        factors = {"data.accumulation": accumulation, **{f"mesh.{name}": mesh.shape[name] for name in sharding.ROWS}}
        product = " × ".join(f"{name}={value}" for name, value in factors.items())
        raise ValueError(
            f"data.batch_size: {rows} rows cannot be split into {product} = {parts} equal parts; choose a multiple of {parts}."
        )


def first_examples(config, count: int, *, held_out: bool = False) -> list[data.Example]:
    """Return the first `count` examples of each source."""
    sources = config.data.eval_sources if held_out else config.data.sources
    found = (_examples(config, source) for source in sources.values())
    return [example for examples in found for example in itertools.islice(examples, count)]


def held_out_examples(config, count: int) -> list[data.Example]:
    """Return the first `count` held-out examples that have an answer to compare with, taken in turn from each source.

    Raises:
      ValueError: examples are asked for and there is none.
    """
    if not count:
        return []
    sources = [_examples(config, source) for source in config.data.eval_sources.values()]
    answered = [list(itertools.islice(filter(data.answer, examples), count)) for examples in sources]
    width = max(map(len, answered), default=0)
    if not width:
        raise ValueError(
            f"eval.generate.examples: no row of data.eval_sources ({', '.join(config.data.eval_sources) or 'there is none'}) has an answer "
            "to compare with; set eval.generate.examples and eval.samples to 0, or add a source of prompts and answers."
        )
    return [examples[at] for at in range(width) for examples in answered if at < len(examples)][:count]


def _examples(config, source) -> Iterator[data.Example]:
    """Yield the examples of a source; of judged responses the good ones."""
    wanted, options = objective.needs(config).data, {"bad_rows": config.data.bad_rows}
    if rollouts.used(config):
        yield from data.read_prompts(plain(source), **options)
    elif wanted == "messages":
        yield from data.read(plain(source), **options)
    else:
        yield from (one.responses[0] for one in data.read_judged(plain(source), wanted, **options) if one.numbers.get("desirable", 1))


def quiz(config, loaded: Loaded, encoder: data.Encoder, attach: Callable[[TrainState], Params]) -> measure.Quiz:
    """Return the held-out prompts of `config.eval` for a model in training."""
    options = plain(config.eval.generate)
    count = max(options.pop("examples"), config.eval.samples)
    return measure.Quiz(loaded.model, attach, encoder, held_out_examples(config, count), options)


def on_mesh(batch: Any, mesh: Mesh) -> Any:
    """Return this process's rows of a batch as its part of the whole one, on the mesh."""
    return sharding.shard_batch(batch, mesh)
