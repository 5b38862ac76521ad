"""A model out: the Hugging Face folder that `transformers`, vLLM or llama.cpp's converter load, adapters merged in.

A model with a value head goes out as `…ForSequenceClassification` of one label, which has `score.weight` where a language model has its
output head.

One layer of one leaf at a time is materialised, fetched and written, so neither host nor device ever holds a second model. Quantised
matrices are written as dense ones, or packed as they are, in a layout of `ftjax.hf.quantized`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import models, tree, weights
from ftjax.hf import checksums, names, quantized
from ftjax.hf.lazy import Index, LazyTensor, cast, swap, unstacked
from ftjax.hf.write import SHARD_BYTES, Entry, new_folder, write_json, write_shards, write_tokenizer
from ftjax.types import VALUE_HEAD, Model, Params


def export_model(
    folder: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    base_name: str = "",
    layout: str = "dense",
) -> Path:
    """Write config, weights, tokenizer with its chat template, generation config and model card.

    Args:
      folder: a new folder; it appears when everything in it is written.
      model: whose config is written.
      params: the tree that `model.apply` takes, perhaps with a value head, or one of lazy arrays (`hf.load.lazy_params`); a `Weight` leaf
        (an attached adapter, a quantised matrix) is written as its dense array, or as `layout` says.
      tokenizer: as from `ftjax.hf.tokenizer.load`; None writes none.
      dtype: of all dense tensors in the files; each leaf's own if None.
      shard_bytes: the size that a safetensors file may have, if more than one tensor is in it.
      base_name: the model that this one was trained from, for the model card.
      layout: of quantised matrices: "dense", or packed as "bitsandbytes" (nf4, fp4, int8), "gptq" (int4, uint4, uint8) or "ftjax" (all) has
        them, bit for bit what is in the tree, with a checksum of each tensor; "auto" is bitsandbytes' if that has a place for all of them,
        else ftjax's own.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: the tree does not have the leaves of the model (all that is wrong is listed), an adapter cannot be merged, a value head
        has a bias, or the layout has no place for a quantised matrix; nothing is written.
    """
    leaves, classifies = _leaves(model, params), VALUE_HEAD in params
    dtypes = {path: jnp.dtype(dtype or leaf.dtype) for path, leaf in leaves.items()}
    config = models.to_hf(model.config, classifies=classifies) | {"torch_dtype": dtypes["embed_tokens/kernel"].name}
    tensors, settings = _tensors(leaves, dtypes, layout)
    config |= {quantized.CONFIG: settings} if settings else {}
    if classifies and tokenizer is not None:
        tokenizer = _padding_of_its_own(tokenizer)
        config["pad_token_id"] = tokenizer.pad_token_id
    with new_folder(Path(folder)) as temporary:
        write_json(temporary / "config.json", config)
        if not classifies:
            write_json(temporary / "generation_config.json", _generation_config(config, tokenizer))
        (temporary / "README.md").write_text(
            _card(config, base_name, sum(math.prod(leaf.shape) for leaf in leaves.values())), encoding="utf-8"
        )
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer)
        _write_weights(temporary, tensors, shard_bytes, checked=bool(settings))
    return Path(folder)


def _padding_of_its_own(tokenizer: Any) -> Any:
    """Return a tokenizer whose padding ends no text: a classifier reads the last token that is not padding, which may be the EOS."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in (tokenizer.unk_token, *special) if token not in (None, tokenizer.eos_token)]
    if not found:
        raise ValueError("export: a classifier needs a padding token that ends no text, and the tokenizer has no other special token.")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = found[0]
    return tokenizer


def _leaves(model: Model, params: Params) -> dict[str, Any]:
    """Return the leaves that are written."""
    leaves = tree.flatten(params)
    expected = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    if VALUE_HEAD in params:
        bias = leaves.pop(f"{VALUE_HEAD}/bias", None)
        if bias is not None and np.any(np.asarray(bias)):
            raise ValueError("export: the value head has a bias, which Hugging Face's classifiers have not: train it with bias=False.")
        expected[f"{VALUE_HEAD}/kernel"] = jax.ShapeDtypeStruct((model.config.hidden_size, 1), jnp.float32)
    _check(expected, leaves)
    return {path: leaf for path, leaf in leaves.items() if VALUE_HEAD not in params or path != "lm_head/kernel"}


def _check(expected: dict[str, Any], leaves: dict[str, Any]) -> None:
    problems = [f"missing: {path} {list(expected[path].shape)}" for path in sorted(expected.keys() - leaves.keys())]
    problems += [f"extra: {path} {list(leaves[path].shape)}" for path in sorted(leaves.keys() - expected.keys())]
    problems += [
        f"misshapen: {path} is {list(leaves[path].shape)}, expected {list(expected[path].shape)}"
        for path in sorted(expected.keys() & leaves.keys())
        if leaves[path].shape != expected[path].shape
    ]
    if problems:
        added = "\nWhat a method adds to a model cannot be merged: keep the adapter beside it (`ftjax generate --adapter=…`)."
        hint = added if any(path.startswith("layers/slots/") for path in leaves) else ""
        listing = "\n  ".join(problems)
        raise ValueError(f"export: the tree does not fit the model ({len(problems)} problems):\n  {listing}{hint}")


def _tensors(leaves: dict[str, Any], dtypes: dict[str, np.dtype], layout: str) -> tuple[dict[str, LazyTensor], dict[str, Any] | None]:
    """Return what is written, leaf after leaf in the order of `names.tensors`, and what the config says of how it is quantised."""
    packed = {path: leaf for path, leaf in leaves.items() if layout != "dense" and _is_packed(path, leaf)}
    matrices = {module: one for path, leaf in packed.items() for module, one in _matrices(path, leaf)}
    dense = [path for path, leaf in leaves.items() if path.endswith("kernel") and path not in packed]
    modules = {name for path in dense for name in names.modules(path, leaves[path].shape) if names.is_transposed(path)}
    settings, parts = quantized.written(layout, matrices, modules) if layout != "dense" else (None, {})
    tensors = {}
    for path, leaf in leaves.items():
        if path in packed:
            for module in names.modules(path, leaf.shape):
                tensors |= {f"{module}.{part}": tensor for part, tensor in parts[module].items()}
        else:
            for layer, name in enumerate(names.tensors(path, leaf.shape)):
                tensors[name] = _dense(path, leaf, layer if names.is_stacked(path) else None, dtypes[path])
    return tensors, settings


def _is_packed(path: str, leaf: Any) -> bool:
    if isinstance(leaf, weights.Wrapper):
        raise ValueError(f"export: {path!r} is a {type(leaf).__name__}: merge the adapter before the matrix is written quantised.")
    return isinstance(leaf, quantized.Packed)


def _matrices(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """Yield `(module, matrix of lazy arrays)` of a packed leaf."""
    for layer, module in enumerate(names.modules(path, leaf.shape)):
        index = layer if names.is_stacked(path) else None
        yield module, jax.tree.map(lambda array, index=index: _lazy(array, index), leaf)


def _lazy(array: jax.Array | LazyTensor, layer: int | None) -> LazyTensor:
    if isinstance(array, LazyTensor):
        return array if layer is None else unstacked(array, layer)
    shape = array.shape if layer is None else array.shape[1:]
    return LazyTensor(shape, array.dtype, lambda index: np.asarray(array if layer is None else _layer(array, layer))[index])


def _dense(path: str, leaf: Any, layer: int | None, dtype: np.dtype) -> LazyTensor:
    if isinstance(leaf, LazyTensor):
        tensor = cast(_lazy(leaf, layer), dtype)
        return swap(tensor) if names.is_transposed(path) else tensor

    def fetch(index: Index) -> np.ndarray:
        array = np.asarray(weights.materialize(leaf if layer is None else _layer(leaf, layer)).astype(dtype))
        return (array.T if names.is_transposed(path) else array)[index]

    return LazyTensor(names.leaf_shape(path, leaf.shape), dtype, fetch)


def _write_weights(folder: Path, tensors: dict[str, LazyTensor], shard_bytes: int, *, checked: bool) -> None:
    entries = [Entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    sums: dict[str, int] = {}
    arrays = checksums.recorded(tensors, (tensor.read() for tensor in tensors.values()), sums)
    write_shards(folder, entries, arrays, shard_bytes=shard_bytes)
    if checked:
        write_json(folder / checksums.FILE, checksums.content(sums))


def _layer(leaf: weights.Leaf, layer: int) -> weights.Leaf:
    """Return one layer of a stacked leaf, `Weight` or array, as a scan over layers would."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), leaf)


def _generation_config(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the ids that begin and end a text; a chat model's turn ends with its tokenizer's EOS, whatever its base's config says."""
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer is not None and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    ids = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.get("pad_token_id"),
    }
    return {name: value for name, value in ids.items() if value is not None}


def _card(config: dict[str, Any], base_name: str, num_parameters: int) -> str:
    language = config["architectures"][0].endswith("CausalLM")
    task, kind = ("text-generation", "language") if language else ("text-classification", "reward")
    auto = "CausalLM" if language else "SequenceClassification"
    base = f"base_model: {base_name}\n" if "/" in base_name else ""
    origin = f"It was fine-tuned from `{base_name}`." if base_name else ""
    return f"""---
library_name: transformers
pipeline_tag: {task}
{base}tags:
- ftjax
---

# Model card

A `{config["model_type"]}` {kind} model of {num_parameters:,} parameters, exported by ftjax. {origin}

```python
from transformers import AutoModelFor{auto}, AutoTokenizer

model = AutoModelFor{auto}.from_pretrained("PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""
