"""Make the golden logits of SmolLM2-135M-Instruct: float32, by transformers from the GGUF file.

    python third_party/transformers/smollm2_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

Reference: transformers 5.23.0, torch 2.13.0 (CPU), gguf 0.19.0. Writes tests/goldens/smollm2_logits.npz: the token ids of two prompts,
the ids and logits of the 20 likeliest tokens at each position, and every eighth logit at the last position.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "smollm2_logits.npz"
PROMPTS = (
    "<|im_start|>user\nWhat is the capital of Switzerland?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
)


@torch.no_grad()
def main():
    path = pathlib.Path(sys.argv[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    golden = {}
    for n, prompt in enumerate(PROMPTS):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        logits = model(tokens).logits[0]
        top = logits.topk(20)
        golden |= {
            f"tokens_{n}": tokens[0].numpy().astype(np.int32),
            f"top_ids_{n}": top.indices.numpy().astype(np.int32),
            f"top_logits_{n}": top.values.numpy(),
            f"last_{n}": logits[-1, ::8].numpy(),
        }
    np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    main()
