"""Time LoRA steps of transformers + PEFT on PyTorch: one side of experiments/sft_speed.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, peft==0.21.2, gguf, psutil; for --base bitsandbytes==0.50.2.
Usage: python third_party/peft/sft_speed.py FILE.gguf TOKENS.npy --dtype float32 --steps 4 [--base nf4]
Prints one line of JSON. TOKENS.npy is int `[steps, b, t]`; every token but the first of a row is trained.
"""

import argparse
import json
import pathlib
import resource
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--base", default="", choices=("", "nf4"), help="the format of the frozen matrices; empty: dense")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    began = time.time()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name, dtype=getattr(torch, args.dtype))
    if args.base:
        quantize(model, args.base, getattr(torch, args.dtype))
    base_gb = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e9
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    batches = torch.from_numpy(np.load(args.tokens).astype(np.int64))
    seconds, losses = [], []
    for step in range(args.steps):
        start = time.time()
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.time() - start)
        if step == 0:
            first = time.time() - began
    result = {
        "system": " ".join(filter(None, ("PEFT", args.base, args.dtype))),
        "seconds": seconds[1:],
        "tokens": int(batches[0].numel()),
        "first_step": first,
        "base_gb": base_gb,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "losses": losses,
        "trainable": sum(p.numel() for p in trained),
    }
    print(json.dumps(result))


def quantize(model, quant_type, dtype):
    """Put bitsandbytes' 4-bit layers, with nested scales, in the place of the decoder's linear ones."""
    import bitsandbytes

    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, linear in [(n, m) for n, m in module.named_children() if isinstance(m, torch.nn.Linear)]:
                options = {"bias": linear.bias is not None, "compute_dtype": dtype, "compress_statistics": True, "quant_type": quant_type}
                packed = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, **options)
                packed.load_state_dict(linear.state_dict())
                setattr(module, name, packed.to("cpu"))


if __name__ == "__main__":
    main()
