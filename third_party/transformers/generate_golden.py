"""Make the golden greedy completions of SmolLM2-135M-Instruct: float32, by transformers from the GGUF file.

    python third_party/transformers/generate_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

Reference: transformers 5.23.0, torch 2.13.0 (CPU), gguf 0.19.0. Writes tests/goldens/smollm2_greedy.json: for each prompt its text, its
token ids and the ids of 32 greedy tokens, end-of-sequence token included; and the least margin by which a token won, in logits: where
it is far above float32's rounding, another implementation must choose the same tokens.
"""

import json
import pathlib
import sys

import torch
import transformers

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "smollm2_greedy.json"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    CHAT.format("What is the capital of Switzerland?"),
    CHAT.format("Sort these numbers from smallest to largest: 41, 7, 96, 23. Answer with the sorted list only."),
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived",
)


@torch.no_grad()
def main():
    path = pathlib.Path(sys.argv[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    golden = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(tokens, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True)
        best = torch.cat(found.logits).topk(2).values
        golden.append(
            {
                "prompt": prompt,
                "tokens": tokens[0].tolist(),
                "completion": found.sequences[0, tokens.shape[1] :].tolist(),
                "margin": round(float((best[:, 0] - best[:, 1]).min()), 4),
            }
        )
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
