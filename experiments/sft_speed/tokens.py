"""Write the rows of tokens that the systems train on: GSM8K's problems and solutions as running text.

Usage: python -m experiments.sft_speed.tokens MODEL.gguf train.jsonl TOKENS.npy [STEPS]
TOKENS.npy is int32 `[steps, 4, 512]`.
"""

import json
import pathlib
import sys

import numpy as np

from ftjax.hf import tokenizer

ROWS, TOKENS = 4, 512


def main() -> None:
    model, source, target = map(pathlib.Path, sys.argv[1:4])
    shape = (int(sys.argv[4]) if len(sys.argv) > 4 else 4, ROWS, TOKENS)
    words = tokenizer.load(model)
    problems = map(json.loads, source.read_text().splitlines())
    ids = words.encode("\n\n".join(f"{problem['question']}\n{problem['answer']}" for problem in problems))[: np.prod(shape)]
    np.save(target, np.reshape(ids, shape).astype(np.int32))


if __name__ == "__main__":
    main()
