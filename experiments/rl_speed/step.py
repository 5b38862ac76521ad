"""Time GRPO steps of ftjax: one side of the comparison, through the same functions that `ftjax train` calls.

Usage: python experiments/rl_speed/step.py MODEL.gguf WORK.json --dtype bfloat16 --steps 4
Prints one line of JSON. WORK.json is from experiments/generation_speed/workload.py, whose first `--prompts` prompts are those of each step.
A step samples, judges, compares and learns once: 64 tokens to each of 8 samples of each prompt, none of which ends before.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import data, losses, online, optimizers, peft, rollout, scoring, train, tree
from ftjax.cli import runtime
from ftjax.hf import load
from ftjax.losses import advantages


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="elementwise")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--apart", action="store_true", help="train each sample in a row of its own, its prompt with it")
    parser.add_argument("--slots", type=int, default=0, help="samples written at a time; 0: all")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    runtime.keep_memory()
    began = time.time()
    model, params, tokenizer, _ = load.load(args.model, dtype=args.dtype, remat=args.remat)
    method = peft.lora("all-linear", rank=16, alpha=32)
    frozen, trainable = method.init(jax.random.key(0), params)
    del params
    given = json.loads(args.work.read_text())["prompts"][: args.prompts]
    prompts = [data.Prompt(np.asarray(prompt, np.int32), data.Example(())) for prompt in given]
    count, most = len(prompts) * args.samples, max(map(len, given)) + args.max_tokens
    engine = rollout.Engine(model, slots=args.slots or count, slot_tokens=most)  # no token ends a sample
    sample = online.sampler(engine, max_tokens=args.max_tokens, sampling=rollout.settings(temperature=1.0))
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=args.steps)
    look = partial(scoring.score, model, outputs=(*losses.NEEDS["grpo"].outputs, "entropy"))
    loss = partial(losses.LOSSES["grpo"], kl_coef=0.0)
    loss = loss if args.apart else losses.unpacked(loss)
    step = train.make_train_step(look, method, loss, optimizer, accumulation=args.accumulation)
    state = train.init_state(jax.random.key(0), trainable, method, optimizer)
    del trainable
    seconds, sampling, rewards = [], [], []
    for index in range(args.steps):
        start = time.time()
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), (len(prompts), args.samples))
        samples = sample(method.attach(frozen, state.trainable), prompts, keys)
        sampled = time.time()
        texts = [tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True) for one in samples]
        worth = jnp.asarray(list(map(reward, texts)), jnp.float32).reshape(len(prompts), args.samples)
        found = advantages.group_relative(worth, jnp.ones_like(worth))
        batch = online.rows([prompt.tokens for prompt in prompts for _ in range(args.samples)], samples, max_tokens=most)
        batch = dataclasses.replace(batch, advantages=np.asarray(found).reshape(-1))
        batch = jax.device_put(batch if args.apart else online.together(batch, args.samples))
        state, metrics = step(state, frozen, batch)
        metrics["loss"].value()
        seconds.append(time.time() - start)
        sampling.append(sampled - start)
        rewards.append(float(worth.mean()))
        if index == 0:
            first = time.time() - began
    said = {
        "system": f"ftjax {args.dtype} (JAX {jax.__version__}), prompts {'once a sample' if args.apart else 'once'}",
        "seconds": seconds[1:],
        "sampling": sampling[1:],
        "tokens": sum(len(one.tokens) for one in samples),
        "first_step": first,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "rewards": rewards,
        "trainable": tree.size(state.trainable),
    }
    print(json.dumps(said))


def reward(text: str) -> float:
    """Return the share of digits: as cheap as a reward can be, and different for every sample."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


if __name__ == "__main__":
    main()
