"""Time `transformers.generate` with its cache on a CPU: one side of experiments/generation_speed.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, gguf.
Usage: python third_party/transformers/generation_speed.py MODEL.gguf WORK.json --load mixed --dtype bfloat16 --rows 32
Prints one line of JSON. Prompts of like length share a batch, which goes on until its longest completion has ended.
"""

import argparse
import json
import pathlib
import resource
import time

import torch
import transformers


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--load", default="uniform")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(2)
    work = json.loads(args.work.read_text())
    source = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    unpacked = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, args.dtype), quantization_config=unpacked)
    model.eval()
    seconds = []
    for _ in range(1 + args.repeats):
        began = time.perf_counter()
        tokens = generate(model, work, args)
        seconds.append(time.perf_counter() - began)
    result = {
        "system": f"transformers {args.dtype}, {args.rows} rows",
        "load": args.load,
        "tokens": tokens,
        "seconds": seconds[1:],
        "first": seconds[0],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps(result))


def generate(model, work, args):
    """Return the number of tokens written, those behind a row's end not counted."""
    prompts, ends = work["prompts"], set(work["eos_ids"])
    lengths = work["lengths"][args.load]
    order, total = sorted(range(len(prompts)), key=lambda at: -len(prompts[at])), 0
    for first in range(0, len(order), args.rows):
        chosen = order[first : first + args.rows]
        width = max(len(prompts[at]) for at in chosen)
        tokens = torch.tensor([[0] * (width - len(prompts[at])) + prompts[at] for at in chosen])
        mask = torch.tensor([[0] * (width - len(prompts[at])) + [1] * len(prompts[at]) for at in chosen])
        most = work["most"] if lengths is None else max(lengths[at] for at in chosen)
        model.generation_config.eos_token_id = sorted(ends) if lengths is None else None
        written = model.generate(tokens, attention_mask=mask, max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=0)
        for at, row in zip(chosen, written[:, width:].tolist(), strict=True):
            ended = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            total += ended if lengths is None else lengths[at]
    return total


if __name__ == "__main__":
    main()
