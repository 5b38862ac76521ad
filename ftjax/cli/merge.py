"""Fold an adapter into its model, or several models or adapters into one, and write the result as a Hugging Face or PEFT folder.

ftjax merge --model=… --adapter=DIR --output=DIR                          base + adapter, as `ftjax export`, and how much that changed
ftjax merge --models=A,B --recipe=linear --factors=0.7,0.3 --output=DIR   a weighted average
ftjax merge --models=A,B --recipe=ties --base=C --density=0.2 --output=DIR
ftjax merge --models=A,B --recipe=passthrough --layers=0:16,8:24 --output=DIR
ftjax merge --adapter=a=DIR --adapter=b=DIR --how=ties --factors=1,0.5 --density=0.5 --output=DIR    LoRAs with names: one LoRA
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from ftjax import hub, weights
from ftjax.cli import combining, export, pretrained, runtime
from ftjax.hf import load, mix, tokenizer
from ftjax.hf.folder import Checkpoint
from ftjax.peft.combine import HOW
from ftjax.types import Params, pytree, static
from ftjax.weights import Leaf, Wrapper

PROBES = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "def add(a, b):\n    return a + b\n",
    "Natalia sold 48 clips in April and half as many in May. How many did she sell in all?",
    "请用一句话介绍你自己。",
)
"""Texts on which the merged model is compared with the adapted one, unless `--probe` names a file of others."""
BOUND = 0.05
"""The most that merging may change logits by, in their standard deviations, where nothing but rounding does."""


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax merge`."""
    export.define_flags(flags, argv)
    absl_flags.DEFINE_string("probe", "", "a text file, a probe a line, to compare adapted and merged model on", flags)
    about = (
        f"refuse to merge an adapter if logits change by more, in their standard deviations (default: {BOUND}; none for a quantised base)"
    )
    absl_flags.DEFINE_float("max_change", None, about, flag_values=flags)
    absl_flags.DEFINE_list("models", [], "folders (or .gguf files, hub ids, known names) to mix", flag_values=flags)
    absl_flags.DEFINE_enum("recipe", "linear", [*mix.RECIPES, "passthrough"], "how models are mixed", flag_values=flags)
    absl_flags.DEFINE_string("base", "", f"the model they were tuned from, for {', '.join(mix.NEED_BASE)}", flags)
    about = "a number for each model (default: equal shares, or 1 each over a base) or adapter (default: 1 each)"
    absl_flags.DEFINE_list("factors", [], about, flag_values=flags)
    absl_flags.DEFINE_float("density", 0.5, "the share of each change that ties, dare and magnitude_prune keep", flag_values=flags)
    absl_flags.DEFINE_integer("seed", 0, "of what dare drops", flag_values=flags)
    absl_flags.DEFINE_enum("how", "cat", HOW, "how adapters with names become one: see `ftjax.peft.combine`", flag_values=flags)
    about = "of that one, for the svd forms (default: the largest of theirs)"
    absl_flags.DEFINE_integer("rank", None, about, flag_values=flags, lower_bound=1)
    about = "for ties of adapters: the sign of an entry is that of the sum, or of the most of them"
    absl_flags.DEFINE_enum("sign", "total", ["total", "frequency"], about, flag_values=flags)
    absl_flags.DEFINE_list("layers", [], "for passthrough: first:end for each model", flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Merge."""
    if not flags.output:
        raise ValueError("merge: --output=FOLDER is needed.")
    if flags.models:
        if flags.model or flags.adapter or flags.workdir:
            raise ValueError("merge: --models mixes whole models; leave --model, --adapter and --workdir out, or merge the adapter first.")
        return mix_models(flags)
    if not flags.adapter and not flags.workdir:
        raise ValueError("merge: name what to fold in: --adapter=FOLDER, --workdir=RUN or --models=A,B.")
    folders = pretrained.adapter_folders(flags.adapter)
    if set(folders) - {""}:
        return combine_adapters(folders, flags)
    return export.main(flags, check=lambda found, dtype: report_change(found, dtype, flags.probe, flags.max_change))


def mix_models(flags: absl_flags.FlagValues) -> None:
    """Write the mixture of `--models`."""
    output = runtime.local_path("output", flags.output)
    models = [_checkpoint(name) for name in flags.models]
    words = tokenizer.load(models[0].path)
    if flags.recipe == "passthrough":
        folder = mix.passthrough(output, [(model, *bounds) for model, bounds in zip(models, _bounds(flags), strict=True)], words)
    else:
        folder = mix.mix(
            output,
            models,
            words,
            recipe=flags.recipe,
            base=_checkpoint(flags.base) if flags.base else None,
            factors=_factors(flags),
            density=flags.density,
            seed=flags.seed,
        )
    print(f"wrote {folder}")


def combine_adapters(folders: Mapping[str, Path], flags: absl_flags.FlagValues) -> None:
    """Write the LoRA that those of several folders become."""
    if flags.workdir:
        raise ValueError("merge: adapters with names become one adapter; leave --workdir out, or give it as --adapter=NAME=RUN.")
    if flags.rank is not None and not flags.how.endswith("svd"):
        raise ValueError(f"merge: --rank is for the svd forms of --how, not for {flags.how!r}, which leaves the rank no choice.")
    folder = combining.combine(
        runtime.local_path("output", flags.output),
        folders,
        flags.model,
        factors=_factors(flags),
        how=flags.how,
        rank=flags.rank,
        density=flags.density,
        sign=flags.sign,
        seed=flags.seed,
    )
    print(f"wrote {folder}")


def _checkpoint(name: str) -> Checkpoint:
    return load.read(hub.find(name))


def _factors(flags: absl_flags.FlagValues) -> list[float] | None:
    found = []
    for text in flags.factors:
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"--factors: {text!r} is not a number.") from None
    return found or None


def _bounds(flags: absl_flags.FlagValues) -> list[tuple[int, int]]:
    if len(flags.layers) != len(flags.models):
        raise ValueError(f"--layers: {len(flags.models)} models need as many slices (first:end), not {len(flags.layers)}.")
    pairs = [text.split(":") for text in flags.layers]
    for text, pair in zip(flags.layers, pairs, strict=True):
        if len(pair) != 2 or not all(bound.isdigit() for bound in pair):
            raise ValueError(f"--layers: {text!r} is not like 0:16 (the first layer, and the one to stop before).")
    return [(int(start), int(stop)) for start, stop in pairs]


def report_change(found: export.Found, dtype: Any, probe: str, bound: float | None) -> None:
    """Print how much merging moves the logits, and refuse beyond `bound` (mean change over the standard deviation of the logits).

    Merging is exact but for one rounding of each weight to the dtype of the file; that of a float32 run may lose more. What was trained
    over a quantised base is another model over the dense one, or quantised anew, and no bound is known beforehand. The merged
    weights are made layer by layer, so there is no second model.
    """
    texts = runtime.local_path("probe", probe).read_text(encoding="utf-8").splitlines() if probe else PROBES
    model, words = found.loaded.model, found.loaded.tokenizer
    trained, merged = found.params if found.trained is None else found.trained, rounded(found.params, dtype)
    worst, total, count, squares = 0.0, 0.0, 0, 0.0
    logits = jax.jit(lambda params, tokens: model.unembed(model.head(params), model.apply(params, tokens)[0]))
    for text in filter(None, texts):
        tokens = jnp.asarray([words.encode(text)], jnp.int32)
        before, after = (np.asarray(logits(params, tokens), np.float64) for params in (trained, merged))
        difference = np.abs(after - before)
        worst, total, count = max(worst, difference.max()), total + difference.sum(), count + difference.size
        squares += np.square(before - before.mean()).sum()
    if not count:
        raise ValueError(f"--probe: {probe} holds no text.")
    mean, spread = total / count, float(np.sqrt(squares / count))
    print(f"merging changes the logits by {mean:.2g} on average and {worst:.2g} at most; their standard deviation is {spread:.2g}")
    if bound is None:
        bound = BOUND if found.trained is None else np.inf
    if not mean <= bound * spread:
        raise ValueError(
            f"merge: the merged model is not the adapted one: logits change by {mean / spread:.1%} of their standard deviation, the bound "
            f"is {bound:.1%}. Write more exact files with --dtype=float32, keep the adapter apart, or raise --max_change."
        )


@pytree
class Rounded(Wrapper):
    """The base's dense array in the dtype that it will be written in."""

    base: Leaf
    stored: Any = static()

    def materialize(self) -> jax.Array:
        return weights.materialize(self.base).astype(self.stored)


def rounded(params: Params, dtype: Any) -> Params:
    """Return the parameters as they will read back from the file: each leaf in `dtype`, or in its own if None."""
    return jax.tree.map(lambda leaf: Rounded(leaf, jnp.dtype(dtype or leaf.dtype)), params, is_leaf=lambda x: isinstance(x, weights.Weight))
