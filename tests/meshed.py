"""One small training run that every mesh must repeat; as a program, one of several processes that share it.

python -m tests.meshed <process> <processes> <port> <output.npz>
"""

import sys
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np
import optax

from ftjax import losses, models, peft, scoring, sharding, tree
from ftjax.train import init_state, make_train_step
from ftjax.types import Batch

ROWS, TIME, STEPS = 16, 12, 3
OUTPUTS = ("logps", "entropy", "greedy")
LORA_AND_FULL = peft.chain(peft.lora("all-linear", rank=4, init="gaussian"), peft.full("norms", name="norms"))
FULL = peft.full("everything")
ANCHORED = peft.anchored(FULL)
DORA_AND_FA = peft.chain(peft.lora_fa("mlp", rank=4), peft.dora("attention", rank=4, init="gaussian"))


class Run(NamedTuple):
    losses: list
    grad_norms: list
    frozen: dict
    state: object
    step: object
    where: object

    @property
    def trained(self) -> dict:
        return {path: np.asarray(leaf) for path, leaf in tree.flatten(self.state.trainable).items()}


def rows(step: int, first: int = 0, last: int = ROWS, *, responses: tuple[int, ...] = ()) -> Batch:
    """Rows of unequal length, one of them nothing but padding; with `responses=(2,)` two and two of them are pairs."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, 260, (ROWS, TIME), dtype=np.int32)
    lengths = random.integers(3, TIME + 1, (ROWS, 1))
    lengths[step] = 0
    time = np.broadcast_to(np.arange(TIME, dtype=np.int32), (ROWS, TIME))
    real = (time < lengths).astype(np.int32)
    batch = Batch(tokens * real, (real * (time > 1)).astype(np.float32), time.copy(), real)
    return jax.tree.map(lambda x: x[first:last].reshape(-1, *responses, TIME), batch)


@cache
def start(method, preset="tiny-llama"):
    """Return `(frozen, trainable)` before the first step, on the host."""
    model_key, method_key = jax.random.split(jax.random.key(1))
    params = jax.jit(models.build(models.preset(preset)).init)(model_key)
    return jax.tree.map(np.asarray, method.init(method_key, params))


def train(
    mesh=None,
    method=LORA_AND_FULL,
    *,
    accumulation=1,
    chunk_tokens=TIME,
    preset="tiny-llama",
    loss_fn=losses.sft,
    outputs=OUTPUTS,
    responses=(),
    **build,
) -> Run:
    """Train a tiny model; without a mesh by the plain functions, so that they are what a mesh is compared with.

    With `responses` rows are pairs and have a reference, that of an anchored method.
    """
    model = models.build(models.preset(preset), **build)
    optimizer = optax.sgd(0.3, momentum=0.9)  # not Adam, which would blow a rounding difference of a tiny gradient up to a whole step
    make_state = partial(init_state, method=method, optimizer=optimizer)
    where = None
    if mesh is None:
        frozen, trainable = jax.device_put(start(method, preset))
        state = make_state(jax.random.key(2), trainable)
    else:
        model = sharding.on_mesh(model, mesh)
        frozen, trainable = (sharding.place(host, mesh) for host in start(method, preset))
        state = sharding.init_on_mesh(make_state, jax.random.key(2), trainable, mesh=mesh)
        where = sharding.state_shardings(state, mesh)
    score = partial(scoring.score, model, chunk_tokens=chunk_tokens, outputs=outputs)
    options = {"accumulation": accumulation, "state_sharding": where}
    if responses:
        options["complete"] = lambda frozen, batch: losses.with_reference(batch, score(peft.reference(frozen), batch))
    step = make_train_step(score, method, loss_fn, optimizer, **options)
    lost, norms = [], []
    for n in range(STEPS):
        state, metrics = step(state, frozen, rows(n, responses=responses) if mesh is None else my_rows(n, mesh, responses=responses))
        lost.append(metrics["loss"].value())
        norms.append(metrics["grad_norm"].value())
    return Run(lost, norms, frozen, state, step, where)


def my_rows(step: int, mesh, **options) -> Batch:
    """Return the batch of a step on the mesh, of which this process makes its share."""
    index, count = sharding.batch_share(mesh)
    return sharding.shard_batch(rows(step, ROWS // count * index, ROWS // count * (index + 1), **options), mesh)


def main(process: str, processes: str, port: str, output: str) -> None:
    """Train as one of several processes, and write the losses and weights as this one sees them."""
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    run = train(sharding.make_mesh(data=2, fsdp=-1))
    whole = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(run.where.step.mesh, jax.sharding.PartitionSpec()))
    weights = tree.flatten(whole(run.state.trainable))
    np.savez(output, losses=run.losses, **{path: np.asarray(leaf) for path, leaf in weights.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
