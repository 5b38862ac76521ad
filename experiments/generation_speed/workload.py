"""Write the prompts and lengths that every system is given: 64 questions of GSM8K as chats, in JSON.

Usage: python experiments/generation_speed/workload.py MODEL.gguf test.jsonl WORK.json [--prompts 64]

* `uniform`: every completion has 64 tokens, whatever they are.
* `mixed`: a completion ends where the model ends it, at 256 tokens at the latest.
* `skewed`: one completion in eight has 256 tokens, the others 16, whatever they are; the lengths lie in no order.
"""

import argparse
import json
import pathlib

import numpy as np

from ftjax import rollout
from ftjax.hf import load


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("questions", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    found = load.load(args.model, dtype="float32")
    encoder = rollout.Encoder(found.model, found.tokenizer)
    with args.questions.open() as lines:
        questions = [json.loads(line)["question"] for line, _ in zip(lines, range(args.prompts), strict=False)]
    prompts = [encoder.encode([{"role": "user", "content": question}]).tolist() for question in questions]
    skewed = np.random.default_rng(0).permutation([256 if n % 8 == 0 else 16 for n in range(len(prompts))]).tolist()
    loads = {"uniform": [64] * len(prompts), "mixed": None, "skewed": skewed}
    args.output.write_text(json.dumps({"prompts": prompts, "eos_ids": encoder.eos_ids, "most": 256, "lengths": loads}))


if __name__ == "__main__":
    main()
