"""Do transformers and bitsandbytes compute from our quantised folders what we compute? Two halves, for two environments:

    python third_party/bitsandbytes/check_export.py write DIR     # with ftjax
    python third_party/bitsandbytes/check_export.py check DIR     # with torch, transformers, accelerate and bitsandbytes

`write` quantises a tiny random model of each family whose sizes allow it, in each format, and exports it in bitsandbytes' layout with our
logits. `check` loads them as any other quantised folder and prints the largest relative difference of the logits; of int8, whose product in
bitsandbytes rounds the activations to eight bits too, that of the model that `dequantize()` makes.

It printed:

    transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0+cpu, float32
    gemma2_fp4     Linear4bit   4.9e-07
    gemma2_int8    Linear8bitLt 6.9e-07
    gemma2_nf4     Linear4bit   5.4e-07
    llama_fp4      Linear4bit   1.5e-07
    llama_int8     Linear8bitLt 3.0e-07
    llama_nf4      Linear4bit   2.0e-07
    mistral_fp4    Linear4bit   2.4e-07
    mistral_int8   Linear8bitLt 3.3e-07
    mistral_nf4    Linear4bit   2.4e-07
    qwen2_fp4      Linear4bit   1.5e-07
    qwen2_int8     Linear8bitLt 3.0e-07
    qwen2_nf4      Linear4bit   2.0e-07
    qwen3_fp4      Linear4bit   3.5e-07
    qwen3_int8     Linear8bitLt 3.6e-07
    qwen3_nf4      Linear4bit   3.6e-07
"""

import pathlib
import sys

import numpy as np

TOKENS = (np.arange(16) * 37 % 257)[None].astype(np.int32)
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
FORMATS = {"nf4": {"nested": True}, "fp4": {"nested": False}, "int8": {"group": None}}


def write(folder):
    import jax
    import jax.numpy as jnp

    from ftjax import models, quant
    from ftjax.hf import export

    for family in FAMILIES:
        raw = models.PRESETS[f"tiny-{family}"] | SIZES
        model = models.build(models.config_from_hf(raw | ({"query_pre_attn_scalar": 16} if family == "gemma2" else {})))
        params = model.init(jax.random.key(0))
        for format, options in FORMATS.items():
            packed, _ = quant.quantized(format, **options).init(jax.random.key(0), params)
            target = folder / f"{family}_{format}"
            export.export_model(target, model, packed, None, layout="bitsandbytes")
            hidden, _ = model.apply(packed, jnp.asarray(TOKENS))
            np.save(target / "logits.npy", np.asarray(model.unembed(model.head(packed), hidden))[0])


def check(folder):
    import bitsandbytes
    import torch
    import transformers

    print(f"    transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, float32")
    for target in sorted(folder.iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        kinds = {type(module).__name__ for module in model.modules()} & {"Linear4bit", "Linear8bitLt"}
        model = model.dequantize() if target.name.endswith("int8") else model.train()  # in eval an AVX512 CPU multiplies in bfloat16
        theirs = model(torch.from_numpy(TOKENS).long()).logits[0].detach().numpy()
        ours = np.load(target / "logits.npy")
        print(f"    {target.name:14} {' '.join(kinds):12} {np.abs(theirs - ours).max() / np.abs(ours).max():.1e}")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
