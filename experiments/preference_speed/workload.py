"""Write the pairs that every system is given: prompts and responses of HH-RLHF, end to end and cut into lengths that fill a row.

Usage: python experiments/preference_speed/workload.py MODEL.gguf harmless_base_test.jsonl.gz PAIRS.npz [--prompt 256] [--response 256]

PAIRS.npz has `prompts` `[n, p]`, `chosen` `[n, t]` and `rejected` `[n, t]`: tokens. What a response says has nothing to do with its prompt
any more; what it costs has not changed.
"""

import argparse

import numpy as np

from ftjax import data
from ftjax.hf import load


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("output")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=256)
    args = parser.parse_args()
    encoder = data.make_encoder(load.load(args.model, dtype="float32").tokenizer, max_tokens=512)
    loader, _ = data.load_judged({"hh": {"path": args.rows}}, encoder, wanted=data.PAIRS, batch_size=1, bad_rows="skip")
    sequences = loader.sequences
    streams: dict[str, list[np.ndarray]] = {"prompts": [], "chosen": [], "rejected": []}
    for at, (first, last) in enumerate(zip(sequences.starts[:-1], sequences.starts[1:], strict=True)):
        tokens, trained = sequences.tokens[first:last], sequences.loss_mask[first:last] > 0
        name = ("chosen", "rejected")[at % 2]
        streams[name].append(tokens[trained])
        if name == "chosen":
            streams["prompts"].append(tokens[~trained])
    sizes = {"prompts": args.prompt, "chosen": args.response, "rejected": args.response}
    found = {name: np.concatenate(parts)[: args.pairs * sizes[name]].reshape(args.pairs, -1) for name, parts in streams.items()}
    np.savez(args.output, **found)


if __name__ == "__main__":
    main()
