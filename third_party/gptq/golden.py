"""Write tiny folders in GPTQ's layout, packed by AutoGPTQ, and what AutoGPTQ says their matrices are.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, numpy, and the files of auto-gptq 0.7.1, which need not be installed:
`pip download --no-deps auto-gptq==0.7.1` and unpack the wheel.
Usage: python third_party/gptq/golden.py WHEEL_FOLDER tests/goldens/quantized

gptq: symmetric, group 32. gptq_sorted: with zeros, group 32, its rows grouped in a random order, as desc_act=true leaves them. In 8 bits
gptq_8bit and gptq_8bit_sorted. Numbers are rounded to nearest; how a code was chosen is nothing to a reader. `expected.json` holds the
SHA-256 of each matrix `[o, i]` in float16, -0 as 0: the product of AutoGPTQ's module with the identity; and transformers' logits with the
matrices in float32.
"""

import hashlib
import importlib.util
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 32
TOKENS = torch.arange(3, 15)[None]


def quant_linear(wheel: str):
    path = pathlib.Path(wheel) / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def model() -> torch.nn.Module:
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
    return LlamaForCausalLM(config).half()


def packed(linear: torch.nn.Linear, QuantLinear, symmetric: bool, ordered: bool, bits: int):
    o, i = linear.weight.shape
    n, most = i // GROUP, 2**bits - 1
    groups = torch.arange(i) // GROUP if ordered else (torch.randperm(i) // GROUP)
    rows = linear.weight.data.float()[:, torch.argsort(groups, stable=True)].reshape(o, n, GROUP)
    if symmetric:
        scales = rows.abs().amax(-1) / (most // 2)
        zeros = torch.full_like(scales, (most + 1) // 2)
    else:
        scales = (rows.amax(-1) - rows.amin(-1)) / most
        zeros = torch.round(-rows.amin(-1) / scales).clamp(1, most)
    scales = scales.half().float()
    rows = (torch.round(rows / scales[..., None] + zeros[..., None]).clamp(0, most) - zeros[..., None]) * scales[..., None]
    linear.weight.data = rows.reshape(o, i)[:, torch.argsort(torch.argsort(groups, stable=True))]
    module = QuantLinear(bits, GROUP, i, o, False)
    module.pack(linear, scales, zeros.clone(), groups.to(torch.int32))
    module.scales = module.scales.half()
    return module


def write(folder: pathlib.Path, QuantLinear, symmetric: bool, ordered: bool, bits: int = 4) -> None:
    dense = model()
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    found = {}
    for name, linear in dense.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            module = packed(linear, QuantLinear, symmetric, ordered, bits)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
            tensors[f"{name}.bias"] = torch.zeros(linear.out_features, dtype=torch.float16)  # as AutoGPTQ saves it
            matrix = module(torch.eye(linear.in_features, dtype=torch.float16)).T
            module.scales = module.scales.float()
            linear.weight.data = module(torch.eye(linear.in_features)).T
            found[name] = hashlib.sha256((matrix + 0).contiguous().numpy().tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    settings = {"bits": bits, "group_size": GROUP, "damp_percent": 0.01, "desc_act": not ordered, "static_groups": False, "sym": symmetric}
    settings |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq"}
    config = dense.config.to_dict() | {"quantization_config": settings | {"checkpoint_format": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    whole = LlamaForCausalLM(dense.config).float()  # a new one: `half` rounded the frequencies of the RoPE too
    whole.load_state_dict(dense.state_dict())
    with torch.no_grad():
        logits = whole(TOKENS).logits[0, -1].tolist()
    expected = {"sha256": found, "tokens": TOKENS[0].tolist(), "logits": logits}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    out, QuantLinear = pathlib.Path(sys.argv[2]), quant_linear(sys.argv[1])
    write(out / "gptq", QuantLinear, symmetric=True, ordered=True)
    write(out / "gptq_sorted", QuantLinear, symmetric=False, ordered=False)
    write(out / "gptq_8bit", QuantLinear, symmetric=True, ordered=True, bits=8)
    write(out / "gptq_8bit_sorted", QuantLinear, symmetric=False, ordered=False, bits=8)


if __name__ == "__main__":
    main()
