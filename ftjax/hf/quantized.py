"""Quantised checkpoints: the tensors that a matrix is made of in a file become one lazy matrix, and one that is packed goes out as them.

Each library has a layout of its own, found by the `quant_method` of `config.json`: a module of this folder that reads the tensors of one
matrix, and writes them where we do. Nothing dense is made of what is packed unless its numbers are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.hf import names, quantized_awq, quantized_bitsandbytes, quantized_gptq, quantized_own
from ftjax.hf.lazy import Index, LazyTensor, aligned, from_array, stack
from ftjax.hf.quantized_parts import DTYPES, Parts, Unfit, in_dtype, plain
from ftjax.quant import QuantizedWeight
from ftjax.quant.permuted import PermutedWeight

Packed = QuantizedWeight | PermutedWeight
CONFIG = "quantization_config"
OLD_CONFIGS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "quantize_config.json": lambda said: {**said, "quant_method": "gptq"},
    "quant_config.json": lambda said: {_AWQ_NAMES.get(name, name): value for name, value in said.items()} | {"quant_method": "awq"},
}
"""Where AutoGPTQ and AutoAWQ wrote it before it was a part of `config.json`, and what that is as it."""
_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}
_SHOWN = 8


class Layout(NamedTuple):
    """How a library writes quantised matrices."""

    parts: re.Pattern[str]
    """Of the name of a tensor: the module, and which of its parts."""
    options: Mapping[str, tuple[Any, ...] | None]
    """Of `quantization_config`: the values that are implemented, None where all are, as they say nothing of the numbers."""
    read: Callable[[Parts], Packed]
    write: Callable[[Packed], dict[str, LazyTensor]] | None = None
    settings: Callable[[Mapping[str, Packed], Iterable[str]], dict[str, Any]] | None = None
    """`settings({module: matrix}, dense modules)`: the `quantization_config`."""


LAYOUTS: Mapping[str, Layout] = {
    "bitsandbytes": Layout(
        quantized_bitsandbytes.PARTS,
        quantized_bitsandbytes.OPTIONS,
        quantized_bitsandbytes.read,
        quantized_bitsandbytes.write,
        quantized_bitsandbytes.settings,
    ),
    "gptq": Layout(quantized_gptq.PARTS, quantized_gptq.OPTIONS, quantized_gptq.read, quantized_gptq.write, quantized_gptq.settings),
    "awq": Layout(quantized_awq.PARTS, quantized_awq.OPTIONS, quantized_awq.read),
    "ftjax": Layout(quantized_own.PARTS, quantized_own.OPTIONS, quantized_own.read, quantized_own.write, quantized_own.settings),
}
"""By `quant_method`."""


def gathered(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *, old: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return config and tensors of a folder as those of the dense model that it stands for.

    The config has no `quantization_config`; a packed matrix is one tensor, `….weight [o, i]`, that is decoded when it is read, and whose
    `packed` is the matrix `[i, o]` of lazy arrays.

    Args:
      folder: named in errors.
      config: of the folder.
      tensors: of the folder, by name.
      old: settings that were found beside the config.

    Raises:
      ValueError: the method or an option is unknown, or matrices are not what the layout says they are; all of them are listed.
    """
    settings = config.get(CONFIG) or old
    plain_config = {name: value for name, value in config.items() if name != CONFIG}
    if not settings:
        return plain_config, dict(tensors)
    layout = _layout(folder, settings)
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), np.dtype(np.float16))
    found, modules = dict(tensors), {}
    for name, tensor in tensors.items():
        if match := layout.parts.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor
    problems = []
    for module, parts in modules.items():
        if set(parts) == {"weight"}:
            continue  # a dense one
        for part in parts:
            del found[f"{module}.{part}"]
        try:
            found[f"{module}.weight"] = _decoded(layout.read(Parts(module, parts, settings, dtype)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listing = "\n  ".join(problems[:_SHOWN] + more)
        raise ValueError(f"hf: the quantised matrices of {folder} cannot be read ({len(problems)} problems):\n  {listing}")
    return plain_config, found


def _layout(folder: Path, settings: Mapping[str, Any]) -> Layout:
    """Return the layout that a `quantization_config` names, if it has the options that are implemented."""
    method = settings.get("quant_method")
    if method is None and any(f"load_in_{bits}bit" in settings for bits in (4, 8)):
        method = "bitsandbytes"  # before transformers 4.33
    if method not in LAYOUTS:
        raise ValueError(f"hf: {folder}: quant_method {method!r} is not implemented; nearest: {tree.nearest(str(method), LAYOUTS)}.")
    options, problems = LAYOUTS[method].options, []
    for name, value in settings.items():
        if name == "quant_method":
            continue
        if name not in options:
            problems.append(f"{name!r} is not a known option; nearest: {tree.nearest(name, options)}")
        elif options[name] is not None and value not in options[name]:
            problems.append(f"{name}={value!r} is not implemented, only {' or '.join(map(repr, options[name]))} is")
    if problems:
        raise ValueError(f"hf: {folder}: the {CONFIG} of {method}: {'; '.join(problems)}.")
    return LAYOUTS[method]


def _decoded(weight: Packed) -> LazyTensor:
    def fetch(index: Index) -> np.ndarray:
        return np.asarray(jax.tree.map(lambda part: jnp.asarray(part.read()), weight).materialize()).T[index]

    i, o = weight.shape
    return LazyTensor((o, i), np.dtype(weight.dtype), fetch, weight)


def leaf(path: str, tensors: list[LazyTensor], dtype: Any = None) -> Packed:
    """Return a leaf of packed matrices, of lazy arrays: stacked, where it is one of layers.

    Args:
      path: of the leaf.
      tensors: of `gathered`, one for each layer.
      dtype: of what is materialised of it; the file's if None.

    Raises:
      ValueError: the layers are not all packed and in one way, or the leaf is no matrix that multiplies.
    """
    if not names.is_transposed(path):
        raise ValueError(f"hf: {path!r} is quantised in the file; only matrices that multiply can be, not an embedding.")
    kinds = [_described(tensor.packed) for tensor in tensors]
    if len(set(kinds)) > 1:
        odd = next(layer for layer, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"hf: {path!r} is {kinds[0]} in layer 0 and {kinds[odd]} in layer {odd}; layers are stacked, so a leaf has one format. "
            "Quantise the dense model anew, the whole leaf or nothing of it."
        )
    weights = [in_dtype(tensor.packed, dtype or tensor.dtype) for tensor in tensors]
    if any(isinstance(weight, PermutedWeight) for weight in weights):
        weights = [_permuted(weight) for weight in weights]
    join = (lambda *layers: stack(layers)) if names.is_stacked(path) else aligned
    return jax.tree.map(join, *weights)


def _described(weight: Packed | None) -> str:
    if weight is None:
        return "dense"
    base = plain(weight)
    return f"{base.format} by {base.group} rows" + (" with nested scales" if base.nested else "") + f" of {base.dtype_name}"


def _permuted(weight: Packed) -> PermutedWeight:
    order = np.arange(weight.shape[-2], dtype=np.int32)
    return weight if isinstance(weight, PermutedWeight) else PermutedWeight(weight, from_array(order))


def is_padding(name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]) -> bool:
    """Return whether a tensor is the bias of zeros that AutoGPTQ gives matrices that have none."""
    module, _, part = name.rpartition(".")
    owner = tensors.get(f"{module}.weight")
    return part == "bias" and owner is not None and owner.packed is not None and not np.any(tensor.read())


def written(layout: str, matrices: Mapping[str, Packed], dense: Iterable[str]) -> tuple[dict[str, Any], dict[str, dict[str, LazyTensor]]]:
    """Return the `quantization_config` of a layout for packed matrices, and what each is written as.

    Args:
      layout: one of `LAYOUTS`, or "auto": bitsandbytes' if that has a place for all of them, else ftjax's own.
      matrices: by module.
      dense: the modules of matrices that are not packed.

    Raises:
      ValueError: there is no such layout, or it has no place for a matrix.
    """
    writable = [name for name, one in LAYOUTS.items() if one.write]
    if layout not in ("auto", *writable):
        raise ValueError(
            f"export: quantised matrices cannot be written as {layout!r}; nearest: {tree.nearest(layout, ['auto', *writable])}."
        )
    if not matrices:
        raise ValueError(f"export: the tree has no quantised matrices to write as {layout!r}; leave the layout out.")
    found = LAYOUTS["bitsandbytes" if layout == "auto" else layout]
    module, tensors = "the model", {}
    try:
        for module, weight in matrices.items():
            tensors[module] = found.write(weight)
        module = "the model"
        return found.settings(matrices, dense), tensors
    except Unfit as problem:
        if layout == "auto":
            return written("ftjax", matrices, dense)
        raise ValueError(f"export: {module}: {problem}. Write ftjax's own files with layout='ftjax'.") from problem
