"""Say what a training step needs of each device, and whether it fits, before any weight is loaded.

  ftjax plan --config=configs/quickstart.py                                       this machine
  ftjax plan --config=configs/sft_llama3_8b_lora.py --topology=v5e:2x4            a TPU slice, compiled for by libtpu; no TPU is needed
  ftjax plan --config=configs/qlora_llama3_70b.py --topology=gpu:48GB             a GPU of so many GiB; several: gpu:8x80GB

From shapes alone: no array is made and no weight is read. Where model.name is a folder or a .gguf file, its config and the headers of its
files say what it is, and how it is packed; of a model that would have to be fetched model.preset does, and the plan says so. The step is
then compiled for the topology, or for what stands for it, unless --compile=False. The exit code is 0 where the step fits and 3 where not.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags as absl_flags
from ml_collections import ConfigDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ftjax import hub, logs, quant, tree
from ftjax.cli import abstract, build, footprint, knobs, objective, products, runtime, topology
from ftjax.cli import config as configs
from ftjax.cli.footprint import Footprint
from ftjax.cli.topology import Topology
from ftjax.logs.terminal import megabytes

DOES_NOT_FIT = 3

LEFT_OUT = {
    "cpu": "Python, JAX, the tokenizer and the data; the compiler while it works",
    "gpu": "the CUDA context and its libraries, what autotuning tries, and fragmentation",
    "tpu": "the program itself",
}
"""Beside what every plan leaves out."""

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*?(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])", re.DOTALL)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NAMES = {
    "forward": "at the end of the forward pass",
    "backward": "in the backward pass",
    "update": "in the update",
    "sampling": "while it samples, between the steps",
}
_PREALLOCATED = 0.75
"""Of a GPU's memory, that JAX takes at its start."""


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax plan`."""
    configs.define(flags, argv)
    absl_flags.DEFINE_string("topology", "here", "here, a GPU as gpu:48GB, or a TPU slice as v5p:2x2x1", flag_values=flags)
    absl_flags.DEFINE_bool("compile", True, "compile the step, beside the estimate from its shapes", flag_values=flags)
    absl_flags.DEFINE_bool("knobs", False, "show what each knob saves though the step fits", flag_values=flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> int:
    """Print the plan."""
    if flags.config is None:
        raise ValueError("plan: --config=FILE is needed, as in: ftjax plan --config=configs/quickstart.py --topology=gpu:24GB")
    topology.prepare(flags.topology)
    runtime.start(flags)
    found = topology.find(flags.topology)
    config, terminal = resolved(flags.config, found), logs.Terminal()
    objective.check_batch(config)
    mesh = build.mesh(config, found.devices)
    built = abstract.built(config, mesh)
    estimate = footprint.of(config, mesh, found.kind, built)
    terminal.say(model(config, built))
    part = f"{mesh.size} devices of " if mesh.size < len(found.devices) else ""
    terminal.say(f"on {part}{found.described}")
    terminal.heading("Bytes of each device" if mesh.size > 1 else "Bytes")
    terminal.say(table(estimate, built))
    compiled = compile_step(built, found) if flags.compile else None
    terminal.heading("Does it fit?")
    fits = verdict(terminal, found, estimate, compiled)
    if flags.knobs or not fits:
        terminal.heading("What would make it fit?" if not fits else "What each knob saves")
        beyond = peak(found, estimate, compiled) - estimate.peak  # what the compiler says beyond the estimate, it will say with a knob too
        terminal.say(knob_table(knobs.tried(config, found, budget=found.memory - beyond), found.memory, beyond, estimate))
    return 0 if fits else DOES_NOT_FIT


def resolved(config: ConfigDict, where: Topology) -> ConfigDict:
    """Return a copy in which "auto" has become the dtype that it is on the topology."""
    config = config.copy_and_resolve_references()
    if config.model.dtype == "auto" and where.kind != "cpu":
        config.model.dtype = "bfloat16"
    return build.resolved(config)


def model(config: ConfigDict, built: abstract.Built) -> str:
    """Return what is trained, in words, and where its architecture comes from if that is not as the config's fields say."""
    whole, trained, rows = logs.parameters(built.params), tree.size(built.state.trainable), config.data.batch_size
    split = f" in {config.data.accumulation} micro-batches" if config.data.accumulation > 1 else ""
    leaves = map(products.bare, tree.flatten(built.params).values())
    formats = sorted({leaf.format for leaf in leaves if isinstance(leaf, quant.PackedWeight)})
    packed = f", in its files as {' and '.join(formats)}" if formats else ""
    name, note = origin(config)
    sweep = "; of a sweep's members one" if config.get("sweep") else ""
    return (
        f"{name}: {whole:,} parameters{packed}, {trained:,} trained by {' + '.join(config.methods)}\n"
        f"{rows} rows of {config.data.max_tokens:,} tokens a step{split}, remat {config.model.remat}, {config.optimizer.name}{sweep}{note}"
    )


def origin(config: ConfigDict) -> tuple[str, str]:
    """Return what to call the model, and a note where its name and its preset may not be one model."""
    where, name, preset = build.origin(config), config.model.name, config.model.preset
    if config.model.random:
        return preset, ""
    if isinstance(where, Path):
        return name, ""
    if name.lower() not in hub.WHEELS:
        how = "download it and name its folder" if "/" in name else "name a folder"
        return preset, f"\n{name} is not on this machine, so this is model.preset={preset}; if that is another architecture, {how}"
    return name, "" if where == preset else f"\nmodel.preset={preset} is not asked, for model.name is known; with model.random=True it is"


class Compiled(NamedTuple):
    """What a compiler says of a step, in bytes of a device."""

    peak: int
    seconds: float
    said: str
    """In words."""


def compile_step(built: abstract.Built, where: Topology) -> Compiled:
    """Return what the compiler for a topology, or for what stands for it, says of the training step."""
    began = time.monotonic()
    lowered = built.train_step.lower(built.state, built.frozen, built.batch)
    try:
        with _quick() if where.devices[0].platform == "tpu" else contextlib.nullcontext():
            memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        size = wanted(str(error))
        if size is None:
            raise
        return Compiled(size, time.monotonic() - began, f"the compiler stops for want of memory: it would take {megabytes(size)}")
    arguments, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    said = f"{megabytes(arguments + rest)}: {megabytes(arguments)} of arguments and {megabytes(rest)} of temporaries"
    return Compiled(arguments + rest, time.monotonic() - began, said)


def wanted(error: str) -> int | None:
    """Return the bytes that libtpu says a program would take, where it stops for want of memory."""
    found = _OUT_OF_MEMORY.search(error)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Let libtpu compile at its lowest level: several times as fast, and it needs no less memory."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def peak(where: Topology, estimate: Footprint, compiled: Compiled | None) -> int:
    """Return the bytes that count: the compiler's with what it cannot know; where it is none for the device, the larger of the two."""
    if compiled is None:
        return estimate.peak
    step = compiled.peak + estimate.past + estimate.beside  # of which the compiler of a step knows nothing
    if where.stand_in:
        return max(estimate.peak, step)
    return max(step + estimate.packed, estimate.held + estimate.moments.get("sampling", 0))


def verdict(terminal: logs.Terminal, where: Topology, estimate: Footprint, compiled: Compiled | None) -> bool:
    """Print the estimate, what the compiler says, what both leave out, and whether the step fits; return that."""
    moments = estimate.moments
    terminal.say(f"from shapes  {megabytes(estimate.peak)}, where it is fullest: {_NAMES[max(moments, key=moments.get)]}")
    if compiled is not None:
        target = f"for {where.stand_in}" if where.stand_in else "for it"
        terminal.say(f"compiled     {target} in {compiled.seconds:.0f} s, {compiled.said}")
    between = "models that judge; evaluation" if estimate.cache else "evaluation and generation"
    terminal.say(f"left out     {LEFT_OUT[where.kind]}; {between}, which {'comes' if estimate.cache else 'come'} between steps")
    if where.stand_in:
        terminal.say("There is no compiler for this GPU here, so this is an estimate.", style="yellow")
    needed = peak(where, estimate, compiled)
    spare = where.memory - needed
    terminal.say(
        Text.assemble(
            ("fits" if spare >= 0 else "does not fit", "bold green" if spare >= 0 else "bold red"),
            f": {megabytes(needed)} of {megabytes(where.memory)}, {megabytes(abs(spare))} {'to spare' if spare >= 0 else 'too much'}",
        )
    )
    if where.kind == "gpu" and spare >= 0 and needed > _PREALLOCATED * where.memory:
        fraction = min(0.99, math.ceil(100 * needed / where.memory + 1) / 100)
        terminal.say(
            f"JAX takes {_PREALLOCATED:.0%} of a GPU's memory unless told otherwise: "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f} ftjax train …"
        )
    return spare >= 0


def table(found: Footprint, built: abstract.Built) -> Table:
    """Return the table of components: what is held all the time, and what exists at each moment of a step."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("component", *found.moments):
        shown.add_column(name, justify="left" if name == "component" else "right")
    dtypes = " and ".join(footprint.base_dtypes(built))
    kept, carried = {"activations kept for backward": found.activations, "copies of trained weights": found.copies}, found.carried
    at = {
        f"base ({dtypes})" if dtypes else "base": (found.base,) * 4,
        "scales of the base": (found.scales,) * 4,
        "adapter, trained weights": (found.adapter,) * 4,
        "copies of it that sample ahead": (found.past,) * 4,
        "optimiser": (found.optimizer,) * 4,
        "batch": (found.batch,) * 4,
        **{name: (size, size, 0) for name, size in kept.items()},
        "logits of a chunk": (found.logits, 0, 0),
        "head, packed by the CPU's library": (found.packed, 0, 0),
        "gradients": (carried, found.gradients, found.gradients - carried),
        "one layer's work": (0, found.layer, 0),
        "updates": (0, 0, found.updates),
        "keys and values of the slots": (*(found.cache if found.ahead else 0,) * 3, found.cache),
        "work of writing to them": (*(found.writing if found.ahead else 0,) * 3, found.writing),
    }
    for name, sizes in at.items():
        sizes = (*sizes, 0)[: len(found.moments)]  # most exist in a step alone
        if any(sizes):
            shown.add_row(name, *(megabytes(size) if size else Text("-", "dim") for size in sizes))
    shown.add_section()
    shown.add_row(Text("in all", "bold"), *(Text(megabytes(found.held + size), "bold") for size in found.moments.values()))
    return shown


def knob_table(found: list[knobs.Tried], memory: int, beyond: int, before: Footprint) -> Group | str:
    """Return the table of knobs: what the step takes with each, what that saves, and whether it fits."""
    if not found:
        return "no knob saves anything"
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("change", "peak", "saves", ""):
        shown.add_column(name, justify="left" if name in ("change", "") else "right", overflow="fold")
    for one in found:
        size = one.footprint.peak + beyond
        spare = memory - size
        fits = Text("fits", "green") if spare >= 0 else Text(f"{megabytes(-spare)} too much", "red")
        shown.add_row(Text(one.flags), megabytes(size), megabytes(before.peak - one.footprint.peak), fits)
    note = "Planned again from shapes" + (", and corrected by what the compiler found beyond them." if beyond > 0 else ".")
    return Group(shown, Text(note, "dim"))
