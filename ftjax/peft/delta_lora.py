"""Delta-LoRA: LoRA whose frozen matrix moves along with the product of the factors, without a gradient of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.peft import inits, low_rank
from ftjax.peft.inits import Init
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.lora import LORA, LoraWeight
from ftjax.peft.unseen import unseen
from ftjax.types import Params, Plan, Transform

OWN = ("start_a", "start_b", "ratio")
"""What the optimiser of the run does not see: A and B at step K, and λ, which is 0 before it."""


def delta_lora(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    ratio: float = 2.0,
    start_steps: int = 0,
    rslora: bool = False,
    init: Init | str = "uniform",
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Layers | None = None,
    name: str = "delta_lora",
) -> Transform:
    """Add a low-rank term, and move the matrix below it by λ times what each step changes of that term.

    y = x (W_t + s A_t B_t),   W_{t+1} = W_t + λ s (A_{t+1} B_{t+1} - A_t B_t) for t ≥ K,   s = alpha / rank   (rsLoRA: alpha / √rank)

    Zi et al., 2023, arXiv 2309.02411, algorithm 1 (which moves W for t > K: that is `start_steps` one higher). W has no gradient and no
    moments, and there is no dropout, as in the paper. The sum telescopes, so W stays where it is and the leaf stands for

    W_t = W_0 + λ s (A_t B_t - A_K B_K),

    for which A_K and B_K are kept in the trainable tree, unseen by the optimiser; nothing is kept where K = 0, for then A_K B_K = 0. What
    one sees in that form: after step K this is LoRA with the scale s (1 + λ) whose gradients are divided by 1 + λ, and a division is
    nothing to Adam. A PEFT folder holds it as a plain LoRA of rank r or, with K > 0, 2r.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None.
      ratio: λ > 0.
      start_steps: K, the updates before W begins to move.
      rslora: divide by √rank instead of rank.
      init: how A and B start, with A B = 0 (see `ftjax.peft.lora`).
      exclude: matrices to leave out among the targets.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; a rank, alpha, ratio, number of steps or init is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = delta_lora(["q_proj"], rank=2, start_steps=500).init(jax.random.key(0), params)
      >>> [(path.rsplit("/", 1)[1], leaf.shape) for path, leaf in tree.flatten(trainable).items()]
      [('a', (2, 4, 2)), ('b', (2, 2, 6)), ('ratio', (2,)), ('start_a', (2, 4, 2)), ('start_b', (2, 2, 6))]
    """
    if ratio <= 0 or start_steps < 0:
        raise ValueError(f"{name}: expected ratio > 0 and start_steps >= 0, not {ratio} and {start_steps}; without a ratio it is lora().")
    make = inits.blind(init, name)
    spec = low_rank.LowRank("delta_lora", name, targets, rank, alpha, rslora, 0.0, exclude, rank_pattern, alpha_pattern)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        trained = {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(key, params):
            a, b = make(leaf_key, leaf.shape, leaf_rank)
            fields = {"a": a, "b": b}
            if start_steps:
                fields |= {"start_a": jnp.zeros_like(a), "start_b": jnp.zeros_like(b), "ratio": jnp.zeros(leaf.shape[:-2], jnp.float32)}
            trained |= {f"{path}/{field}": array for field, array in fields.items()}
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        return tree.replace(
            frozen,
            {
                row.path: LoraWeight(row.base, **factors(row.fields, {"ratio": ratio}), scale=row.scale)
                for row in spec.joined(frozen, trainable, key=None)
            },
        )

    def plan(params: Params) -> tuple[Plan, ...]:
        own = {"ratio": ratio, "start_steps": start_steps}
        return tuple(row._replace(options={**row.options, **own}) for row in spec.plan(params))

    def optimizer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        return anchored(rule, name, ratio=ratio, start_steps=start_steps) if start_steps else rule

    method = Transform(init_fn, attach, plan, optimizer)
    return method if layers is None else on_layers(method, layers)


def factors(trained: Mapping[str, jax.Array], options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return A and B of the plain LoRA that a leaf is: [A, A_K] and [(1 + λ) B, -λ B_K], with the gradients of A B alone."""
    a, b = trained["a"], trained["b"]
    ratio = jax.lax.stop_gradient(trained["ratio"] if "ratio" in trained else jnp.full(a.shape[:-2], options["ratio"], jnp.float32))
    ratio = ratio[..., None, None]
    a, b = _slowed(a, 1 / (1 + ratio)), _slowed(b, 1 / (1 + ratio)) * (1 + ratio)
    if "start_a" not in trained:
        return {"a": a, "b": b}
    start_a, start_b = jax.lax.stop_gradient((trained["start_a"], trained["start_b"]))
    return {"a": jnp.concatenate([a, start_a], -1), "b": jnp.concatenate([b, -ratio * start_b], -2)}


@jax.custom_jvp
def _slowed(x: jax.Array, share: jax.Array) -> jax.Array:
    """Return x, of whose gradient only this share comes back."""
    del share
    return x


@_slowed.defjvp
def _slowed_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x, share), (tangent, _) = primals, tangents
    return x, tangent * share


class AnchorState(NamedTuple):
    """The optimiser of the run, and how many updates it has made."""

    count: jax.Array
    rule: optax.OptState


def anchored(rule: optax.GradientTransformation, name: str, *, ratio: float, start_steps: int) -> optax.GradientTransformation:
    """Return the rule that, at update `start_steps`, also notes the factors it starts from and lets λ in."""

    def own(path: str) -> bool:
        return path.startswith(f"{name}/") and path.rsplit("/", 1)[1] in OWN

    inner = unseen(rule, own)

    def init(params: Params) -> AnchorState:
        return AnchorState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Params, state: AnchorState, params: Params) -> tuple[Params, AnchorState]:
        updates, inner_state = inner.update(updates, state.rule, params)
        begins = state.count == start_steps
        flat, moved = tree.flatten(params), tree.flatten(updates)
        for path in filter(own, flat):
            leaf, field = path.rsplit("/", 1)
            now = ratio if field == "ratio" else flat[f"{leaf}/{field.removeprefix('start_')}"]
            moved[path] = jnp.where(begins, now - flat[path], jnp.zeros_like(flat[path]))
        return tree.unflatten(moved), AnchorState(state.count + 1, inner_state)

    return optax.GradientTransformation(init, update)


DELTA_LORA = LORA._replace(options={option: field for option, field in LORA.options.items() if option != "dropout"})
