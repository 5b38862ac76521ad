"""From files to a parameter tree, tensor by tensor: no weight is ever on the host twice.

model, params, tokenizer, path = load("smollm2-135m-instruct")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import hub, models, quant, tree
from ftjax.hf import depth, folder, gguf, gguf_file, names, packed, quantized, tokenizer
from ftjax.hf.folder import Checkpoint
from ftjax.hf.lazy import LazyTensor, aligned, cast, stack, swap
from ftjax.models import Config
from ftjax.types import VALUE_HEAD, Model, Params, Transform
from ftjax.weights import Leaf

Place = Callable[[str, LazyTensor | quantized.Packed], Leaf]
"""`place(path, tensor) -> leaf`: how a leaf gets onto its devices. With a mesh:
`lambda path, tensor: jax.make_array_from_callback(tensor.shape, sharding(path), tensor.read)`, which reads this host's shards only.
A packed matrix comes as a `Weight` of host or lazy arrays; `ftjax.sharding.placement` takes all of them."""

_SCORE = "score.weight"
"""The tensor of a classifier's head."""


class Pretrained(NamedTuple):
    """All that a name stands for."""

    model: Model
    params: Params
    tokenizer: Any
    path: Path


def load(
    name: str,
    *,
    dtype: str = "auto",
    remat: str = "none",
    place: Place | None = None,
    change: Callable[[Config], Config] = lambda config: config,
    quantizer: Transform | None = None,
    layers: Sequence[int] | None = None,
) -> Pretrained:
    """Find a model by name, read its config, weights and tokenizer.

    Args:
      name: a folder, a `.gguf` file, a known registry model or a hub id (see `ftjax.hub.find`).
      dtype: of the weights: "float32", "bfloat16", or "auto" for the dtype of the file's largest tensor (float32 for dequantised blocks).
      remat: what `models.build` rematerialises.
      place: see `Place`; whole arrays on the default device if None.
      change: what is done to the architecture in the file, such as `models.stretch`; the weights must still fit.
      quantizer: `quant.nf4()` or the like: its matrices are packed as they are read, and never there as a whole.
      layers: indices of the layers that are read, in this order; all if None. The others never leave the file.

    Raises:
      ValueError: the name, the config or a tensor is not as expected; the message says which and what to do.
    """
    read_params = partial(load_params, place=place)
    return _pretrained(name, read_params, dtype=dtype, remat=remat, change=change, quantizer=quantizer, layers=layers)


def lazy(name: str, *, dtype: str = "auto", quantizer: Transform | None = None) -> Pretrained:
    """Find a model by name as `load` does, and leave its weights in their files: its parameters are those of `lazy_params`.

    For what goes through a model once, such as `hf.export.export_model`: it is done in the memory of a few tensors.
    """
    return _pretrained(name, lazy_params, dtype=dtype, quantizer=quantizer)


def _pretrained(
    name: str,
    read_params: Callable[..., Params],
    *,
    dtype: str,
    quantizer: Transform | None,
    remat: str = "none",
    change: Callable[[Config], Config] = lambda config: config,
    layers: Sequence[int] | None = None,
) -> Pretrained:
    path = hub.find(name)
    file = gguf_file.open_file(path) if path.suffix == ".gguf" else None
    checkpoint = gguf.read(path, file) if file else folder.read(path)
    checkpoint = checkpoint if layers is None else depth.with_layers(checkpoint, layers)
    dtype = stored_dtype(checkpoint) if dtype == "auto" else jnp.dtype(dtype)
    model = models.build(change(config_of(checkpoint)), remat=remat)
    params = read_params(checkpoint, model, dtype=dtype, quantizer=quantizer)
    return Pretrained(model, params, tokenizer.from_gguf(file) if file else tokenizer.load(path), path)


def config_of(checkpoint: Checkpoint) -> Config:
    """Return the architecture of a checkpoint.

    A `…ForSequenceClassification` folder of one label is a model with a value head, `value_head/kernel`. Where it has no output head the
    embedding serves as one, and what that says of tokens means nothing.
    """
    config = models.config_from_hf(checkpoint.config)
    headless = _SCORE in checkpoint.tensors and "lm_head.weight" not in checkpoint.tensors
    return dataclasses.replace(config, tie_word_embeddings=True) if headless else config


def read(path: Path) -> Checkpoint:
    """Return the checkpoint at a path that `hub.find` gave: a GGUF file or a folder of safetensors."""
    return gguf.read(path) if path.suffix == ".gguf" else folder.read(path)


def described(path: Path) -> Checkpoint:
    """Return the checkpoint at a path, which may be a folder with a `config.json` and no weights: it has no tensors then.

    Raises:
      ValueError: as `read`; or the config says that the weights are packed, and how is in the files that are not there.
    """
    if path.suffix == ".gguf" or any(path.glob("*.safetensors*")):
        return read(path)
    config = folder.read_json(path / "config.json")
    if quantized.CONFIG in config:
        method = config[quantized.CONFIG].get("quant_method")
        raise ValueError(
            f"hf: {path} holds weights packed by {method!r}, says its config; in which shapes is in the headers of its .safetensors files, "
            "and there is none: copy them too."
        )
    return Checkpoint(path, config, {})


def shapes(checkpoint: Checkpoint, model: Model, *, dtype: Any) -> Params:
    """Return the shapes of what `load_params` gives, packed where the files are; no code of a weight is read."""
    if not checkpoint.tensors:
        return jax.eval_shape(model.init, jax.random.key(0))
    return _shapes(lazy_params(checkpoint, model, dtype=dtype))


def _shapes(params: Params) -> Params:
    return jax.tree.map(lambda tensor: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype), params)


def stored_dtype(checkpoint: Checkpoint) -> np.dtype:
    """Return the dtype of the checkpoint's largest tensor."""
    return max(checkpoint.tensors.values(), key=lambda tensor: int(np.prod(tensor.shape))).dtype


def load_params(
    checkpoint: Checkpoint, model: Model, *, dtype: Any = None, place: Place | None = None, quantizer: Transform | None = None
) -> Params:
    """Read a model's parameters.

    Args:
      checkpoint: from `read`.
      model: whose `init` says which leaves there are, and their shapes.
      dtype: of the leaves; each tensor's own if None, and that of a value head in any case.
      place: see `Place`.
      quantizer: what is packed while it is read, and how, by its plan.

    Raises:
      ValueError: tensors are missing, left over or misshapen; the message lists all of them. A matrix that is to be packed cannot be, or
        holds a number that is not finite; one that is packed already cannot be used as it is.
    """
    leaves, packing = _lazy_leaves(checkpoint, model, dtype, quantizer)
    place = place or on_default_device
    for path, tensor in leaves.items():
        leaves[path] = place(path, packed.pack(path, tensor, **packing[path]) if path in packing else tensor)
    return tree.unflatten(leaves)


def lazy_params(checkpoint: Checkpoint, model: Model, *, dtype: Any = None, quantizer: Transform | None = None) -> Params:
    """Return a model's parameters of lazy arrays; what `quantizer` names is packed when it is read. See `load_params`."""
    leaves, packing = _lazy_leaves(checkpoint, model, dtype, quantizer)
    packer = packed.Packer()
    return tree.unflatten({p: packer.lazy(p, tensor, **packing[p]) if p in packing else tensor for p, tensor in leaves.items()})


def _lazy_leaves(
    checkpoint: Checkpoint, model: Model, dtype: Any, quantizer: Transform | None
) -> tuple[dict[str, LazyTensor | quantized.Packed], dict[str, dict[str, Any]]]:
    """Return the leaves as they lie in the files, and of those that are to be packed how."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(abstract).items()}
    packing = quant.packing(quantizer.plan(abstract)) if quantizer else {}
    if _SCORE in checkpoint.tensors:
        shapes[f"{VALUE_HEAD}/kernel"] = (model.config.hidden_size, 1)
    _check(checkpoint, shapes)
    leaves = {}
    for path, shape in shapes.items():
        tensors = [checkpoint.tensors[name] for name in names.tensors(path, shape)]
        leaves[path] = leaf(path, tensors, None if path.startswith(VALUE_HEAD) else dtype)
    if quantizer:  # its errors come before anything is read
        jax.eval_shape(quantizer.init, jax.random.key(0), _shapes(tree.unflatten(leaves)))
    return leaves, {path: options for path, options in packing.items() if isinstance(leaves[path], LazyTensor)}


def leaf(path: str, tensors: list[LazyTensor], dtype: Any = None) -> LazyTensor | quantized.Packed:
    """Return a leaf of the tree, still in its file, from the Hugging Face tensors it is made of; a packed one as it is."""
    if any(tensor.packed is not None for tensor in tensors):
        return quantized.leaf(path, tensors, dtype)
    if names.is_transposed(path):
        tensors = [swap(tensor) for tensor in tensors]
    tensors = [cast(tensor, dtype or tensors[0].dtype) for tensor in tensors]
    return stack(tensors) if names.is_stacked(path) else aligned(tensors[0])


def on_default_device(path: str, tensor: LazyTensor | quantized.Packed) -> Leaf:
    """Place the whole array, or the packed ones, on JAX's default device."""
    del path
    return jax.device_put(jax.tree.map(lambda part: part.read() if isinstance(part, LazyTensor) else part, tensor))


def _check(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {name: names.leaf_shape(path, shape) for path, shape in shapes.items() for name in names.tensors(path, shape)}
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    tied = {"lm_head.weight"} - set(expected)  # some files repeat the embedding as the head that their config ties to it
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(set(expected) - set(found))]
    problems += [
        f"extra: {name} {list(found[name])}"
        for name in sorted(set(found) - set(expected) - tied)
        if not names.ignorable(name) and not quantized.is_padding(name, checkpoint.tensors[name], checkpoint.tensors)
    ]
    problems += [
        f"misshapen: {name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(set(expected) & set(found))
        if found[name] != expected[name]
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"hf: the tensors of {checkpoint.path} do not fit its config ({len(problems)} problems):\n  {listing}")
