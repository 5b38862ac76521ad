"""Compile the step of a sweep of so many members and say what memory the program asks for; nothing is computed.

Usage: python experiments/sweep_cost/memory.py [--members 1,2,8] [--preset smollm2-135m] [--rows 4] [--tokens 192] [--dtype float32]

LoRA of rank 16 on all linear layers, as in the quick start; the members differ in learning rate. Beside them the step of a plain run.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from configs import quickstart
from ftjax import sweep, train
from ftjax.cli import build, members, objective
from ftjax.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--members", default="1,2,8")
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    config = quickstart.experiment()
    config.model.update({"preset": args.preset, "random": True, "dtype": args.dtype})
    config.mesh.update({"data": 1})
    ids, mask = (jax.ShapeDtypeStruct((args.rows, args.tokens), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ids, mask, ids, ids)
    print("| step of | model, adapters and moments | temporaries |")
    print("|---|---|---|")
    report("a plain run", plain(config, batch))
    for count in map(int, args.members.split(",")):
        report(f"{count} members", swept(config, batch, count))


def plain(config, batch: Batch):
    model, _ = build.architecture(config)
    mesh, method, optimizer, key = build.mesh(config), build.method(config), build.optimizer(config), jax.random.key(0)
    frozen, trainable = jax.eval_shape(lambda key: method.init(key, model.init(key)), key)
    state = jax.eval_shape(partial(train.init_state, method=method, optimizer=optimizer), key, trainable)
    return train.make_train_step(objective.score(config, model, mesh), method, objective.loss(config), optimizer).lower(
        state, frozen, batch
    )


def swept(config, batch: Batch, count: int):
    config = config.copy_and_resolve_references()
    config.sweep = "optimizer.learning_rate=" + ",".join(str((n + 1) * 1e-4) for n in range(count))
    found, (model, _), mesh = members.read(config), build.architecture(config), build.mesh(config)

    def method(numbers):
        return build.method(members.traced(config, numbers))

    def optimizer(numbers):
        return build.optimizer(members.traced(config, numbers))

    keys = jax.random.split(jax.random.key(0), count)
    params = jax.eval_shape(model.init, keys[0])
    own, trainable = jax.eval_shape(partial(sweep.init, [build.method(one.config) for one in found]), keys, params)
    numbers = {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in members.numbers(found).items()}
    frozen = sweep.Frozen(params, own, numbers)
    state = jax.eval_shape(partial(sweep.init_state, method=method, optimizer=optimizer), keys, frozen, trainable)
    return sweep.make_sweep_step(objective.score(config, model, mesh), method, objective.loss(config), optimizer).lower(
        state, frozen, batch
    )


def report(name: str, lowered) -> None:
    memory = lowered.compile().memory_analysis()
    print(f"| {name} | {memory.argument_size_in_bytes / 1e9:.2f} GB | {memory.temp_size_in_bytes / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
