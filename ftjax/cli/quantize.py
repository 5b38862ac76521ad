"""Store a model's matrices in 4 or 8 bits and write it as a Hugging Face folder.

ftjax quantize --model=… --format=nf4 --output=DIR                       as bitsandbytes has it: transformers, PEFT and ftjax load it
ftjax quantize --model=… --format=int4 --group=128 --layout=gptq …       as GPTQ has it; --layout=ftjax takes every format
ftjax quantize --model=… --exclude=".*down_proj/kernel" …                some matrices stay as they are

A matrix of one layer is read, packed and written after another, so the memory is that of a few of them, however large the model.
"""

from __future__ import annotations

from typing import Any

import jax
from absl import flags as absl_flags

from ftjax import logs, quant, tree
from ftjax.cli import pretrained, runtime
from ftjax.hf import export as hf_export
from ftjax.hf import load as hf_load
from ftjax.hf import quantized
from ftjax.logs.terminal import megabytes


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax quantize`."""
    del argv
    absl_flags.DEFINE_string("model", pretrained.DEFAULT, "a folder, .gguf file, hub id or known name", flag_values=flags)
    absl_flags.DEFINE_enum("format", "nf4", list(quant.METHODS), "of the numbers", flag_values=flags)
    absl_flags.DEFINE_integer(
        "group", None, "rows that share a scale (default: 64; all for int8 and uint8)", flag_values=flags, lower_bound=2
    )
    absl_flags.DEFINE_bool("nested", None, "quantise the scales too (default: for nf4 and fp4)", flag_values=flags)
    absl_flags.DEFINE_string("targets", "all-linear", "which matrices: a regular expression over whole paths, or a named filter", flags)
    absl_flags.DEFINE_string("exclude", "", "which of them not", flag_values=flags)
    layouts = ["auto", *(name for name, layout in quantized.LAYOUTS.items() if layout.write)]
    absl_flags.DEFINE_enum(
        "layout", "auto", layouts, "of the files (auto: bitsandbytes' if it has the format, else ftjax's)", flag_values=flags
    )
    absl_flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "of what stays dense (auto: the model's)", flags)
    absl_flags.DEFINE_string("output", None, "the folder to write; new or empty", flag_values=flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Quantise."""
    if not flags.output:
        raise ValueError("quantize: --output=FOLDER is needed.")
    output = runtime.local_path("output", flags.output)
    runtime.start(flags)
    given: dict[str, Any] = {name: flags[name].value for name in ("group", "nested") if flags[name].present}
    quantizer = quant.METHODS[flags.format](flags.targets, exclude=flags.exclude or None, **given)
    model, params, tokenizer, _ = hf_load.lazy(flags.model, dtype=flags.dtype, quantizer=quantizer)
    shapes = jax.tree.map(lambda tensor: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype), params)
    logs.Terminal().say(logs.plan_table(quantizer.plan(shapes), shapes, {}))
    folder = hf_export.export_model(output, model, params, tokenizer, base_name=flags.model, layout=flags.layout)
    print(f"wrote {folder}, {megabytes(tree.num_bytes(shapes))}")
