"""Write tiny folders that transformers and bitsandbytes quantised, and what bitsandbytes says their matrices are.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, accelerate==1.15.0, bitsandbytes==0.50.2, numpy.
Usage: python third_party/bitsandbytes/folder_golden.py tests/goldens/quantized

For each of nf4 (nested scales, two blocks of them), fp4 (float16) and int8 a folder as `save_pretrained` writes it and, beside it,
`expected.json`: the SHA-256 of each matrix dequantised by bitsandbytes, `[o, i]` in the dtype of the model, -0 as 0, and of nf4 the
logits.
"""

import hashlib
import json
import pathlib
import sys
import tempfile

import bitsandbytes.functional as F
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

TOKENS = torch.arange(3, 15)[None]
KINDS = {
    "nf4": (
        torch.float32,
        320,
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "fp4": (torch.float16, 64, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.float16)),
    "int8": (torch.float32, 64, BitsAndBytesConfig(load_in_8bit=True)),
}


def dense_folder(folder: str, dtype: torch.dtype, intermediate_size: int) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.1)
    model.to(dtype).save_pretrained(folder)


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight
    if weight.dtype == torch.int8:
        return F.int8_vectorwise_dequant(weight.data, weight.SCB)
    return F.dequantize_4bit(weight.data, weight.quant_state)


def main() -> None:
    for kind, (dtype, intermediate_size, config) in KINDS.items():
        out = pathlib.Path(sys.argv[1]) / kind
        with tempfile.TemporaryDirectory() as dense:
            dense_folder(dense, dtype, intermediate_size)
            AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(out)
        (out / "generation_config.json").unlink()
        model = AutoModelForCausalLM.from_pretrained(out)
        matrices = {
            name: dequantized(module)
            for name, module in model.named_modules()
            if type(module).__name__.startswith("Linear") and type(module) is not torch.nn.Linear
        }
        found = {name: hashlib.sha256((matrix + 0).contiguous().numpy().tobytes()).hexdigest() for name, matrix in matrices.items()}
        expected = {"sha256": found}
        if kind == "nf4":
            logits = model.train()(TOKENS).logits  # with gradients: without them a CPU that has AVX512-BF16 multiplies in bfloat16
            expected |= {"tokens": TOKENS[0].tolist(), "logits": logits[0, -1].tolist()}
        (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
