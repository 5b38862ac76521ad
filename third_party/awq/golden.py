"""Write a tiny folder in AWQ's layout "gemm", packed and dequantised by AutoAWQ.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, accelerate==1.15.0, numpy, and the files of autoawq 0.2.9, which need
not be installed: `pip download --no-deps autoawq==0.2.9` and unpack it.
Usage: python third_party/awq/golden.py AUTOAWQ_FOLDER tests/goldens/quantized

Numbers are rounded to nearest; how a code was chosen is nothing to a reader. `expected.json` holds the SHA-256 of each matrix `[o, i]` in
float16, -0 as 0, of AutoAWQ's `dequantize_gemm`.
"""

import hashlib
import json
import pathlib
import sys
import types

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 32


def autoawq(folder: str):
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):  # their __init__ import what only a GPU has
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(pathlib.Path(folder) / name.replace(".", "/"))]
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    return WQLinear_GEMM, dequantize_gemm


def main() -> None:
    Linear, dequantize = autoawq(sys.argv[1])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    dense, found = LlamaForCausalLM(config).half(), {}
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    for name, linear in dense.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        groups = linear.weight.data.float().reshape(linear.out_features, -1, GROUP)
        scales = ((groups.amax(-1) - groups.amin(-1)) / 15).half().float()
        zeros = torch.round(-groups.amin(-1) / scales).clamp(0, 15)
        codes = torch.round(groups / scales[..., None] + zeros[..., None]).clamp(0, 15)
        linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).reshape(linear.weight.shape)
        module = Linear.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales")}
        matrix = dequantize(module.qweight, module.qzeros, module.scales, 4, GROUP).T
        found[name] = hashlib.sha256((matrix + 0).contiguous().numpy().tobytes()).hexdigest()
    folder = pathlib.Path(sys.argv[2]) / "awq"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    settings = {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": GROUP,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}, indent=1, default=str) + "\n")
    (folder / "expected.json").write_text(json.dumps({"sha256": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
