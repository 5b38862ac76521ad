"""Several LoRAs in folders into one, as `ftjax merge --adapter=a=DIR --adapter=b=DIR` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ftjax import hub, models, peft
from ftjax.cli import pretrained
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import architecture, load
from ftjax.hf import peft as hf_peft
from ftjax.hf import tokenizer as hf_tokenizer
from ftjax.types import Model, Params


def combine(output: Path, folders: Mapping[str, Path], base: str, *, factors: Sequence[float] | None, **options: Any) -> Path:
    """Write the LoRA that `peft.combine` makes of those in several folders; of the base only its architecture is read.

    Args:
      output: a new folder.
      folders: by name, as `pretrained.adapter_folders` returns them.
      base: the model's name; if empty, the one that the adapters name.
      factors: a number for each; 1 each if None.
      options: of `peft.combine`.

    Raises:
      ValueError: the adapters name different bases and none is given, or were trained with different RoPEs; a folder holds something
        beside a LoRA or another method; and as `peft.combine`.
    """
    base = base or _common_base(folders)
    place = hub.find(base)
    published = load.config_of(load.read(place))
    config = pretrained.trained_in(list(folders.values()), published)
    model = models.build(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    adapted = [_attached(name, folder, model, params) for name, folder in folders.items()]
    method, trainable = peft.combine(adapted, factors, **options)
    words = hf_tokenizer.load(place)
    words = _common_tokenizer({name: pretrained.tokenizer(folder, model, base=words) for name, folder in folders.items()})
    hf_peft.save_adapter(output, model, trainable, method.plan(params), base_name=base, tokenizer=words)
    if config != published:
        architecture.write(output, config)
    return output


def _common_base(folders: Mapping[str, Path]) -> str:
    bases = {name: pretrained.base_name(folder) for name, folder in folders.items()}
    if len(set(bases.values())) > 1:
        listing = ", ".join(f"{name} on {base!r}" for name, base in bases.items())
        raise ValueError(f"--adapter: {listing}; if that is one model by several names, say which by --model.")
    return next(iter(bases.values()))


def _attached(name: str, folder: Path, model: Model, params: Params) -> Params:
    """Return the abstract parameters with the LoRA of a folder on them."""
    if (folder / hf_adapter.CONFIG).is_file():
        raise ValueError(f"--adapter: {name!r} is in ftjax's own form, and LoRAs in PEFT's are combined; merge it into its model instead.")
    adapter = hf_peft.load_adapter(folder, model)
    held = {adapter.kind, *adapter.trainable}
    if held != {"lora"}:
        raise ValueError(f"--adapter: {name!r} holds {', '.join(sorted(held))}, and LoRAs alone can be combined; merge it into its model.")
    return adapter.method.attach(adapter.join(params), adapter.trainable)


def _common_tokenizer(tokenizers: Mapping[str, Any]) -> Any:
    """Return the adapters' tokenizer; where they differ, as their chat templates may, that of the first."""
    (first, chosen), *others = tokenizers.items()
    for name, other in others:
        if (other.chat_template, other.get_vocab()) != (chosen.chat_template, chosen.get_vocab()):
            print(f"note: {first!r} and {name!r} have different tokenizers or chat templates; that of {first!r} is written")
    return chosen
