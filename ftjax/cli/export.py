"""Write a model as a Hugging Face folder that transformers, vLLM and others load.

ftjax export --output=DIR                              the default model
ftjax export --model=… --adapter=DIR --output=DIR      a model with a PEFT adapter folded in (`ftjax merge` is the same)
ftjax export --workdir=runs/mine --output=DIR          what a run trained, from its last checkpoint, by any method
ftjax export --workdir=runs/mine --step=best …         the checkpoint with the best evaluation, or --step=200
ftjax export --workdir=runs/qlora --output=DIR         over a quantised base: folded into the dense one; --quantized: packed anew
ftjax export --workdir=runs/critic --novalue_head …     the language model without the value head, which else makes it a classifier
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags as absl_flags
from etils import epath
from ml_collections import ConfigDict

from ftjax import sharding, tree
from ftjax.checkpoint import Checkpoints
from ftjax.cli import ahead, beginning, build, objective, pretrained, rollouts, runtime, sweep
from ftjax.hf import export as hf_export
from ftjax.hf import load as hf_load
from ftjax.hf import packed as hf_packed
from ftjax.hf import quantized, quantized_parts
from ftjax.peft.soft_prompt import check_no_virtual_tokens
from ftjax.train import init_state
from ftjax.types import VALUE_HEAD, Params
from ftjax.weights import Leaf


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax export` and `ftjax merge`."""
    del argv
    absl_flags.DEFINE_string(
        "model",
        "",
        f"a folder, .gguf file, hub id or known name (default: the adapter's base, else {pretrained.DEFAULT})",
        flag_values=flags,
    )
    about = "a PEFT folder, or a workdir, to fold in; several as NAME=FOLDER are combined (`merge` alone)"
    absl_flags.DEFINE_multi_string("adapter", [], about, flag_values=flags)
    absl_flags.DEFINE_string("workdir", "", "a run of `ftjax train` to export instead", flag_values=flags)
    absl_flags.DEFINE_string("step", "last", "the checkpoint of --workdir: a number, 'last' or 'best'", flag_values=flags)
    absl_flags.DEFINE_string("output", None, "the folder to write; new or empty", flag_values=flags)
    absl_flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "of the files (auto: the model's)", flag_values=flags
    )
    absl_flags.DEFINE_bool("quantized", False, "over a quantised base: write that, the adapter folded in and quantised anew", flags)
    absl_flags.DEFINE_bool("value_head", True, "write a model that has a value head as a classifier; else the language model alone", flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues, *, check: Callable[[Found, str | None], None] = lambda found, dtype: None) -> None:
    """Export; `check(found, dtype)` sees what will be written, and raises if it should not be."""
    if not flags.output:
        raise ValueError("export: --output=FOLDER is needed.")
    if flags.workdir and (flags.model or flags.adapter):
        raise ValueError("export: --workdir says model and method by itself; leave --model and --adapter out.")
    output = runtime.local_path("output", flags.output)
    adapter = pretrained.only_folder(flags.adapter)
    runtime.start(flags)
    found = trained(epath.Path(flags.workdir), flags.step) if flags.workdir else pretrained_model(flags.model, adapter)
    if not flags.value_head:
        found = found._replace(params={name: branch for name, branch in found.params.items() if name != VALUE_HEAD})
    if flags.quantized:
        found = repacked(found)
    check_no_virtual_tokens(tree.flatten(found.params), "export")
    dtype = None if flags.dtype == "auto" else flags.dtype
    check(found, dtype)
    about = {"base_name": found.loaded.name, "layout": "auto" if flags.quantized else "dense"}
    folder = hf_export.export_model(output, found.loaded.model, found.params, found.loaded.tokenizer, dtype=dtype, **about)
    print(f"wrote {folder}")


class Found(NamedTuple):
    """A model and the parameters to write, adapters attached."""

    loaded: build.Loaded
    params: Params
    packing: Mapping[str, Mapping[str, Any]] = {}
    """`{path: arguments of quantize}` of the base that was trained over, where it is packed."""
    trained: Params | None = None
    """The parameters over that base; None where it is the one of `params`."""


def pretrained_model(name: str, folder: Path | None) -> Found:
    """Return a model by name, in the dtype of its file, with the adapter of a folder attached if there is one."""
    name = name or (pretrained.base_name(folder) if folder else pretrained.DEFAULT)
    model, params, tokenizer, _ = hf_load.load(name, change=partial(pretrained.trained_in, [folder] if folder else []))
    tokenizer = pretrained.tokenizer(folder, model, base=tokenizer)
    return Found(build.Loaded(model, params, tokenizer, name), pretrained.attach(model, params, folder), _packing(params))


def trained(workdir: epath.Path, step: str = "last") -> Found:
    """Return the model that a run trained, as it was at a step ("last" and "best" too), on one device."""
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"export: {workdir} holds no run: {path.name} is missing.")
    config = ConfigDict(json.loads(path.read_text()))
    if config.get("sweep"):
        if step not in ("last", "best"):
            raise ValueError("export: of a sweep the best weights of the best member are written; leave --step out.")
        return _over_dense(config, *sweep.best(config, workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", best_metric=config.checkpoint.best_metric)
    chosen = _chosen(checkpoints, step)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    loaded = build.model(config, mesh)
    method, frozen, trainable = beginning.method(config, loaded, mesh)
    optimizer = build.optimizer(config)
    start = partial(init_state, method=method, optimizer=optimizer, carried=objective.carried(config, loaded.model, mesh, method))
    like = ahead.with_past(sharding.init_on_mesh(start, jax.random.key(0), trainable, mesh=mesh), bound=rollouts.staleness(config))
    state, record = checkpoints.restore(like, step=chosen, fall_back=config.checkpoint.fall_back)
    checkpoints.close()
    print(f"step {record.step} of {workdir}")
    return _over_dense(config, loaded, method.attach(frozen, state.trainable))


def _over_dense(config: ConfigDict, loaded: build.Loaded, params: Params) -> Found:
    """Return what a run trained, over the dense base if it packed that one; what is packed in the file or by LoftQ has no other."""
    packing = _packing(params)
    if build.quantizer(config) is None:
        return Found(loaded, params, packing)
    dense = build.model(config, sharding.make_mesh(devices=jax.local_devices()[:1]), packed=False)
    flat, base = tree.flatten(params), tree.flatten(dense.params)

    def rebased(path: str) -> Leaf:
        return jax.tree.map(lambda part: base[path] if _is_packed(part) else part, flat[path], is_leaf=_is_packed)

    return Found(dense, tree.replace(params, {path: rebased(path) for path in packing}), packing, params)


def _packing(params: Params) -> dict[str, dict[str, Any]]:
    """Return how the matrices of a tree are packed, adapters on them or not."""
    found = {path: next(filter(_is_packed, jax.tree.leaves(leaf, is_leaf=_is_packed)), None) for path, leaf in tree.flatten(params).items()}
    bases = {path: quantized_parts.plain(part) for path, part in found.items() if part is not None}
    return {path: {"format": base.format, "group": base.group, "nested": base.nested} for path, base in bases.items()}


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, quantized.Packed)


def repacked(found: Found) -> Found:
    """Return what was trained over a packed base, adapters folded into it and all of it quantised anew."""
    if not found.packing:
        raise ValueError("export: --quantized is for what was trained over a quantised base, which this was not; see `ftjax quantize`.")
    trained = found.params if found.trained is None else found.trained
    flat = tree.flatten(trained)
    packed = {path: hf_packed.repack(path, flat[path], **options) for path, options in found.packing.items()}
    return found._replace(params=tree.replace(trained, packed), trained=trained)


def _chosen(checkpoints: Checkpoints, step: str) -> int | None:
    """Return the number of a step, or None for the last."""
    if step == "last":
        return None
    if step != "best":
        if not step.isdigit():
            raise ValueError(f"export: --step is a number, 'last' or 'best', not {step!r}.")
        return int(step)
    best = checkpoints.best()
    if best is None:
        raise ValueError(f"export: no checkpoint in {checkpoints.folder} was evaluated; use --step=last or one of {checkpoints.steps()}.")
    return best
