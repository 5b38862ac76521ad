"""Time DPO steps of ftjax: one side of the comparison, through the same functions that `ftjax train` calls.

Usage: python experiments/preference_speed/step.py MODEL.gguf PAIRS.npz --dtype bfloat16 --steps 4 [--reference cached] [--packing none]
Prints one line of JSON. PAIRS.npz is from workload.py; a step has `--rows` of its pairs. Its tokens are those of both responses, each with
the prompt, however the pairs lie in the rows.
"""

import argparse
import json
import resource
import time
from functools import partial

import jax
import numpy as np

from ftjax import data, losses, optimizers, peft, scoring, train, tree
from ftjax.cli import runtime
from ftjax.hf import load
from ftjax.types import Batch

PROMPTS = {"shared": "once a pair", "none": "once a response"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="elementwise")
    parser.add_argument("--reference", default="live", choices=("live", "cached"), help="asked in each step, or before the first")
    parser.add_argument("--packing", default="shared", choices=("shared", "none"), help="shared: a pair's prompt stands once in its row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    runtime.keep_memory()
    began = time.time()
    model, params, *_ = load.load(args.model, dtype=args.dtype, remat=args.remat)
    method = peft.anchored(peft.lora("all-linear", rank=16, alpha=32))
    frozen, trainable = method.init(jax.random.key(0), params)
    del params
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=args.steps)
    look = partial(scoring.score, model, outputs=("logps",))

    def complete(frozen, batch: Batch) -> Batch:
        if batch.reference_logps is not None:
            return batch
        return losses.with_reference(batch, look(peft.reference(frozen), batch))

    loss = partial(losses.dpo, beta=0.1)
    loss = loss if args.packing == "none" else losses.unpacked(loss)
    step = train.make_train_step(look, method, loss, optimizer, complete=complete)
    state = train.init_state(jax.random.key(0), trainable, method, optimizer)
    del trainable
    ask = jax.jit(complete)
    given, asking, loader = [], [], pairs(args)
    for index in range(args.steps):
        batch, start = jax.device_put(loader.batch(index)), time.time()
        known = jax.block_until_ready(ask(frozen, batch)) if args.reference == "cached" else batch
        asking.append(time.time() - start)
        given.append(known)
    seconds, seen = [], []
    for index, batch in enumerate(given):
        start = time.time()
        state, metrics = step(state, frozen, batch)
        seen.append(metrics["loss"].value())
        seconds.append(time.time() - start)
        if index == 0:
            first = time.time() - began
    said = {
        "system": f"ftjax {args.dtype} (JAX {jax.__version__}), prompts {PROMPTS[args.packing]}, reference {args.reference}",
        "seconds": seconds[1:],
        "asking": asking[1:],
        "tokens": int(loader.sequences.lengths[: 2 * args.rows].sum()),
        "first_step": first,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "losses": seen,
        "trainable": tree.size(state.trainable),
    }
    print(json.dumps(said))


def pairs(args) -> data.Loader:
    """Return the batches of a file of pairs, in its order."""
    with np.load(args.pairs) as file:
        prompts, responses = file["prompts"], np.stack([file["chosen"], file["rejected"]], axis=1)
    rows = np.concatenate([np.repeat(prompts, 2, axis=0), responses.reshape(2 * len(prompts), -1)], axis=1).astype(np.int32)
    mask = np.broadcast_to(np.arange(rows.shape[1]) >= prompts.shape[1], rows.shape).astype(np.uint8)
    sequences = data.Sequences(rows.reshape(-1), mask.reshape(-1), np.arange(len(rows) + 1) * rows.shape[1])
    options = {"batch_size": args.rows, "max_tokens": rows.shape[1], "packing": args.packing, "responses": 2, "buckets": 1}
    return data.make_loader(sequences, shuffle=False, **options)


if __name__ == "__main__":
    main()
