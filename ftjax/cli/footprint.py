"""How many bytes of a device a training step takes, by component, from shapes alone.

What is held all the time (weights, scales, adapter, optimiser, batch) is exact. The rest is the largest of the moments of a step:

    forward    what the backward pass needs + the logits of a chunk and their exponentials (+ on a CPU a packed copy of the head)
    backward   what the backward pass needs + gradients + the work of one layer
    update     gradients + updates, on a CPU with the new moments beside the old

and of a run that samples, `sampling`: the cache of its slots and the work of writing (see `footprint_sampling`).

What the backward pass needs is exact too, as JAX has it before the compiler: the residuals of the traced step. XLA's CPU before JAX 0.12
takes as much as if it kept those that are bfloat16, and a copy of the dense layers, in float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import scoring, sharding, tree
from ftjax.cli import abstract, build, footprint_sampling, objective, rollouts
from ftjax.kernels.attention.block import BLOCK
from ftjax.kernels.attention.blocked import MAX_BLOCKS

_SCALES = re.compile(r"(.*/kernel)(/base)*/(scales|zeros)(/.*)?")
_PARTS = re.compile(r"(/base|/codes|/order)+$")


class Footprint(NamedTuple):
    """Bytes of the fullest device."""

    base: int
    """Frozen weights of the model, packed ones without their scales."""
    scales: int
    """Scales and zero points of packed weights."""
    adapter: int
    """What is trained, and what methods keep frozen beside it."""
    optimizer: int
    batch: int
    gradients: int
    """Of one micro-batch, and their sum where there are several."""
    updates: int
    copies: int
    """Of weights, made in a step: those that are trained, in the dtype that the model computes in."""
    activations: int
    logits: int
    layer: int
    """The work of one layer's backward pass: what it computes again, its attention scores and, over `fsdp`, its gathered weights."""
    carried: int
    """Summed gradients that exist during the forward pass."""
    packed: int
    """The output head as the matrix library of a CPU copies it in bfloat16 (JAX 0.12); no compiler counts this."""
    past: int = 0
    """Copies of what is trained, which sample what is on its way (`rollout.staleness`)."""
    cache: int = 0
    """Keys and values of the sequences that the policy writes."""
    writing: int = 0
    """What else it takes to write them."""
    ahead: bool = False
    """Whether they are written beside the steps, and not between them."""

    @property
    def held(self) -> int:
        """What exists between two steps, and the batch."""
        return self.base + self.scales + self.adapter + self.optimizer + self.batch + self.past

    @property
    def moments(self) -> dict[str, int]:
        """What exists beside it, at each moment of a step."""
        kept, beside = self.activations + self.copies, self.beside
        return {
            "forward": kept + self.carried + self.logits + self.packed + beside,
            "backward": kept + self.gradients + self.layer + beside,
            "update": self.gradients - self.carried + self.updates + beside,
            **({"sampling": self.cache + self.writing} if self.cache else {}),
        }

    @property
    def beside(self) -> int:
        """What sampling takes while a step is taken."""
        return self.cache + self.writing if self.ahead else 0

    @property
    def peak(self) -> int:
        return self.held + max(self.moments.values())


def of(config, mesh: Mesh, kind: str, built: abstract.Built | None = None) -> Footprint:
    """Return the footprint of a config's step on each device of a mesh.

    Args:
      config: its dtype resolved.
      mesh: of real or described devices.
      kind: "cpu", "gpu" or "tpu": a CPU visits the heads of attention one after another, and keeps old and new moments side by side.
      built: of this config and mesh, if at hand.
    """
    built = abstract.built(config, mesh) if built is None else built
    build.check_rows(config, mesh, accumulation=config.data.accumulation)
    rows = config.data.batch_size // config.data.accumulation // math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    held, own = _frozen(built)
    trained, moments = device_bytes(built.state.trainable), device_bytes((built.state.opt_state, built.state.carried))
    copies, activations = _kept(config, mesh, built, rows, widened=_widens(kind))
    copies += _widened(built) if _widens(kind) else 0
    summed = trained if config.data.accumulation > 1 else 0
    sampled, bound = footprint_sampling.of(config, mesh, kind, built, widened=_widens(kind)), rollouts.staleness(config)
    return Footprint(
        base=held["base"],
        scales=held["scales"],
        adapter=trained + own,
        optimizer=moments,
        batch=device_bytes(built.batch),
        gradients=trained + summed,
        updates=trained + (moments if kind == "cpu" else 0),
        copies=copies,
        activations=activations,
        logits=2 * _logits(config, mesh, built, rows),
        layer=_layer(config, mesh, built, rows, kind),
        carried=summed,
        packed=_packed(built) if kind == "cpu" else 0,
        past=bound * trained,
        cache=sampled.cache,
        writing=sampled.writing,
        ahead=bool(bound) and mesh.size == 1,
    )


def device_bytes(arrays: Any) -> int:
    """Return the bytes of a tree on each device, by its shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _frozen(built: abstract.Built) -> tuple[dict[str, int], int]:
    """Return the bytes of the model's own frozen arrays and their scales, and of those that methods keep beside them."""
    known, sizes = tree.flatten(built.params), {"base": 0, "scales": 0, "own": 0}
    for path, leaf in sharding.rules.paths(built.frozen):
        part = "scales" if _SCALES.fullmatch(path) else "base" if _PARTS.sub("", path) in known else "own"
        sizes[part] += device_bytes(leaf)
    return sizes, sizes.pop("own")


def base_dtypes(built: abstract.Built) -> list[str]:
    """Return the names of the dtypes that the base lies in, its scales apart."""
    return sorted({leaf.dtype.name for path, leaf in sharding.rules.paths(built.frozen) if not _SCALES.fullmatch(path)})


def _widens(kind: str) -> bool:
    """Return whether a step in bfloat16 takes the memory of float32."""
    return kind == "cpu" and jax.__version_info__ < (0, 12)


def _widened(built: abstract.Built) -> int:
    """Return the bytes of a copy in float32 of the dense layers that lie in bfloat16."""
    layers = (leaf for path, leaf in sharding.rules.paths(built.frozen) if path.startswith("layers/") and leaf.dtype == jnp.bfloat16)
    return 2 * device_bytes(list(layers))


def _kept(config, mesh: Mesh, built: abstract.Built, rows: int, *, widened: bool) -> tuple[int, int]:
    """Return the bytes of the copies of weights and of the activations that the backward pass needs, on each device."""
    where = {leaf.shape: _share(leaf) for leaf in jax.tree.leaves((built.state.trainable, built.frozen))}
    weights = {leaf.shape for leaf in jax.tree.leaves(built.params)}
    kept = residuals(config, built, rows)
    copies = [x for x in kept if x.shape in weights and x.ndim > 1]
    rest = [x for x in kept if not (x.shape in weights and x.ndim > 1)]
    return (
        int(sum(_size(x, widened) * where.get(x.shape, 1.0) for x in copies)),
        sum(_size(x, widened) // (mesh.shape["tensor"] if _over_heads(built.model.config, x.shape) else 1) for x in rest),
    )


def residuals(config, built: abstract.Built, rows: int) -> list[Any]:
    """Return shape and dtype of every array that the forward pass of `rows` rows leaves to the backward pass, arguments excepted."""
    alone = sharding.make_mesh(data=1, devices=[jax.devices()[0]])  # the rows of one device
    read = objective.reading(config, objective.in_training(config, built.model), alone, teacher=built.teacher)

    def forward(trainable, frozen, batch, key):
        def loss(trainable):
            mean, metrics = read(built.method.attach(frozen, trainable, key=key), frozen, batch)
            return mean.total, metrics

        return jax.vjp(loss, trainable, has_aux=True)[1]

    batch = abstract.batch(alone, config, rows=rows)
    if "reference" in objective.remembers(config):  # which is in the state; what it says leaves nothing to the backward pass
        batch = dataclasses.replace(batch, reference_logps=batch.loss_mask)
    shapes = (built.state.trainable, built.frozen, batch, built.state.key)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    jaxpr = jax.make_jaxpr(forward)(*shapes).jaxpr
    made = {variable for equation in jaxpr.eqns for variable in equation.outvars}
    kept = dict.fromkeys(v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var) and v in made)  # each once, and no argument
    return [variable.aval for variable in kept]


def _logits(config, mesh: Mesh, built: abstract.Built, rows: int) -> int:
    """Return the bytes of the logits that exist at a time, float32."""
    vocabulary, tokens = built.model.config.vocab_size, config.data.max_tokens
    chunk = min(tokens, max(1, scoring.CHUNK_LOGITS // (rows * vocabulary)))
    chunk = -(-tokens // -(-tokens // chunk))
    split = mesh.shape["tensor"] if vocabulary % mesh.shape["tensor"] == 0 else 1
    return 4 * rows * chunk * vocabulary // split


def _packed(built: abstract.Built) -> int:
    head = jax.tree.leaves(built.model.head(built.params))
    return max(math.prod(x.shape) * x.dtype.itemsize for x in head) if built.model.config.dtype == "bfloat16" else 0


def _layer(config, mesh: Mesh, built: abstract.Built, rows: int, kind: str) -> int:
    """Return about how many bytes the backward pass of one layer works with: twice its products, its attention scores, its weights."""
    layers, shape = built.model.config.num_hidden_layers, built.model.config
    with config.copy_and_resolve_references().unlocked() as other:
        other.model.remat = "elementwise"
    model, _ = build.architecture(other)
    products = _kept(other, mesh, built._replace(model=model), rows, widened=_widens(kind))[1] // layers
    stacked = sum(device_bytes(leaf) for path, leaf in sharding.rules.paths(built.frozen) if path.startswith("layers/"))
    weights = stacked * mesh.shape["fsdp"] // layers
    return 2 * products + _scores(config, shape, rows, kind) // mesh.shape["tensor"] + weights


def _scores(config, shape, rows: int, kind: str) -> int:
    """Return the bytes of attention scores that exist at a time, in float32 and their gradient.

    A CPU has one head at a time, with all of its blocks of queries; others have all heads, with one block.
    """
    tokens = config.data.max_tokens
    reach = min(tokens, config.model.group_tokens or tokens)
    if kind == "cpu":
        return 5 * shape.num_attention_heads // shape.num_key_value_heads * tokens * reach
    block = min(tokens, max(BLOCK, -(-tokens // (MAX_BLOCKS * BLOCK)) * BLOCK))
    return 8 * rows * shape.num_attention_heads * block * reach


def _over_heads(shape, array: tuple[int, ...]) -> bool:
    """Return whether an activation is split over `tensor`: it has an axis of heads, or one of hidden units."""
    heads = {(n, shape.head_dim) for n in (shape.num_attention_heads, shape.num_key_value_heads)}
    grouped = (shape.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads)
    return len(array) > 3 and (
        array[-1] == shape.intermediate_size or array[-2:] in heads or array[2:4] == grouped or grouped[0] in array[2:4]
    )


def _share(leaf: Any) -> float:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) / max(1, math.prod(leaf.shape))


def _size(x: Any, widened: bool) -> int:
    if widened and x.dtype == jnp.bfloat16:
        return 4 * math.prod(x.shape)
    return math.prod(x.shape) * (jnp.dtype(x.dtype).itemsize if not jnp.issubdtype(x.dtype, jax.dtypes.extended) else 8)
