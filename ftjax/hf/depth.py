"""A checkpoint with some of its layers: how a student starts as every second layer of its teacher (Sanh et al., 2019, arXiv 1910.01108)."""

from __future__ import annotations

from collections.abc import Sequence

from ftjax.hf import names
from ftjax.hf.folder import Checkpoint


def with_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """Return the checkpoint whose layers are those of `checkpoint` with these indices, in this order; nothing is read.

    Raises:
      ValueError: there is no layer, or one that the checkpoint has not.
    """
    depth = checkpoint.config["num_hidden_layers"]
    if not layers or not all(isinstance(layer, int) and 0 <= layer < depth for layer in layers):
        raise ValueError(f"hf: layers are indices from 0 to {depth - 1} of {checkpoint.path.name}, not {list(layers)}.")
    parts = {name: names.LAYER.fullmatch(name) for name in checkpoint.tensors}
    tensors = {name: checkpoint.tensors[name] for name, part in parts.items() if part is None}
    for place, layer in enumerate(layers):
        here = {name: part[2] for name, part in parts.items() if part and int(part[1]) == layer}
        tensors |= {f"model.layers.{place}.{rest}": checkpoint.tensors[name] for name, rest in here.items()}
    config = checkpoint.config | {"num_hidden_layers": len(layers)}
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    return checkpoint._replace(config=config, tensors=tensors)
