"""ReLoRA: LoRA that starts again every so many steps, so that thin updates add up to one of high rank."""

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
from ftjax.peft.prune import PRUNES, pruned
from ftjax.peft.riding import by_leaf, check_rank, path_key
from ftjax.peft.unseen import unseen
from ftjax.types import Params, Plan, Transform

PAST = ("past_a", "past_b")
"""The factors of before, side by side; the optimiser of the run does not see them."""


def relora(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    every_steps: int = 1000,
    restarts: int = 1,
    warmup_steps: int = 10,
    prune: str = "magnitude",
    prune_ratio: float = 0.9,
    rslora: bool = False,
    dropout: float = 0.0,
    init: Init | str = "uniform",
    seed: int = 0,
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Layers | None = None,
    name: str = "relora",
) -> Transform:
    """Add a low-rank term, and every so many steps keep it as it is and begin a new one.

    y = x (W + s Σ_n A_n B_n) + s · dropout(x) A B,   s = alpha / rank   (rsLoRA: alpha / √rank)

    Lialin et al., 2023, arXiv 2307.05695. At a restart A_n B_n := A B, A is drawn anew, B = 0 and most of their moments are set to zero;
    the function stays as it is. The learning rate of A and B then rises again: with `schedule="cosine"` this is the paper's jagged cosine,

    rate(t) = schedule(t) · min(1, (n + 1) / (warmup_steps + 1)),   n the updates since the last restart (the factor is 1 before the first).

    Where we differ: the paper adds A B to W; here W never moves and the A_n, B_n stand in the trainable tree, unseen by the optimiser. So
    the sum is exact over any base, and a PEFT folder holds it as a plain LoRA of rank (restarts + 1) r. The paper's full-rank warm start
    is a run of `full` before. The moments are pruned matrix by matrix where the first of them
    is small, all alike; in the paper's code each goes by its own size (see `ftjax.peft.prune`).

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r of one term; (restarts + 1) r may not exceed the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None.
      every_steps: updates between two restarts.
      restarts: how many there are at most; memory for all of them is held from the start.
      warmup_steps: updates over which the learning rate of A and B rises after a restart; 0: none.
      prune: which moments go at a restart: "magnitude", the smallest; "random"; or "reset", all.
      prune_ratio: how many of them, in [0, 1]; moments that are factored (Adafactor's) go altogether.
      rslora: divide by √rank instead of rank.
      dropout: probability, in [0, 1), of zeroing an entry of x on the path of A and B; it acts only where `attach` is given a key.
      init: how A and B start, with A B = 0 (see `ftjax.peft.lora`).
      seed: of the later A's and of random pruning.
      exclude: matrices to leave out among the targets.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; an argument is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 8, 6))}}}
      >>> frozen, trainable = relora(["q_proj"], rank=2, restarts=2).init(jax.random.key(0), params)
      >>> [(path.rsplit("/", 1)[1], leaf.shape) for path, leaf in tree.flatten(trainable).items()]
      [('a', (2, 8, 2)), ('b', (2, 2, 6)), ('past_a', (2, 8, 4)), ('past_b', (2, 4, 6))]
    """
    make = inits.blind(init, name)
    spec = low_rank.LowRank("relora", name, targets, rank, alpha, rslora, dropout, exclude, rank_pattern, alpha_pattern)
    restart = Restart(every_steps, restarts, warmup_steps, prune, prune_ratio, make, seed)
    restart.check(name)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        trained = {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(key, params):
            check_rank(name, (restarts + 1) * leaf_rank, path, leaf.shape)
            a, b = make(leaf_key, leaf.shape, leaf_rank)
            past_a, past_b = jnp.concatenate([jnp.zeros_like(a)] * restarts, -1), jnp.concatenate([jnp.zeros_like(b)] * restarts, -2)
            trained |= {f"{path}/a": a, f"{path}/b": b, f"{path}/past_a": past_a, f"{path}/past_b": past_b}
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        return tree.replace(frozen, {row.path: _joined(row) for row in spec.joined(frozen, trainable, key=key)})

    def plan(params: Params) -> tuple[Plan, ...]:
        own = {"every_steps": every_steps, "restarts": restarts}
        return tuple(row._replace(options={**row.options, **own}) for row in spec.plan(params))

    def optimizer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        return restarted(rule, name, restart)

    method = Transform(init_fn, attach, plan, optimizer)
    return method if layers is None else on_layers(method, layers)


def _joined(row: low_rank.Joined) -> LoraWeight:
    key, rate = row.dropout
    if key is None:
        return LoraWeight(row.base, **factors(row.fields, {}), scale=row.scale)
    past_a, past_b = (jax.lax.stop_gradient(row.fields[field]) for field in PAST)
    return LoraWeight(LoraWeight(row.base, past_a, past_b, row.scale), row.fields["a"], row.fields["b"], row.scale, key, rate)


def factors(trained: Mapping[str, jax.Array], options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return A and B of the plain LoRA that a leaf is: those of now beside those of before."""
    del options
    past_a, past_b = (jax.lax.stop_gradient(trained[field]) for field in PAST)
    return {"a": jnp.concatenate([trained["a"], past_a], -1), "b": jnp.concatenate([trained["b"], past_b], -2)}


class Restart(NamedTuple):
    """When and how: the arguments of `relora`."""

    every_steps: int
    restarts: int
    warmup_steps: int
    prune: str
    prune_ratio: float
    make: Init
    seed: int

    def check(self, name: str) -> None:
        """Refuse what is out of range."""
        if self.every_steps < 1 or self.restarts < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"{name}: expected every_steps >= 1, restarts >= 1 and warmup_steps >= 0, not {self.every_steps}, {self.restarts} and "
                f"{self.warmup_steps}; without restarts it is lora()."
            )
        if self.prune not in PRUNES:
            raise ValueError(f"{name}: there is no prune {self.prune!r}; nearest: {tree.nearest(self.prune, PRUNES)}.")
        if not 0 <= self.prune_ratio <= 1:
            raise ValueError(f"{name}: prune_ratio is a share in [0, 1], not {self.prune_ratio}.")

    def rise(self, count: jax.Array) -> jax.Array:
        """Return the factor of the learning rate of the update after `count` others."""
        rounds = jnp.minimum(count // self.every_steps, self.restarts)
        since = (count - rounds * self.every_steps).astype(jnp.float32)
        return jnp.where(rounds == 0, 1.0, jnp.minimum(1.0, (since + 1) / (self.warmup_steps + 1)))

    def begins(self, count: jax.Array) -> jax.Array:
        """Return whether there is a restart after `count` updates."""
        return (count % self.every_steps == 0) & (count // self.every_steps <= self.restarts)


class RestartState(NamedTuple):
    """The optimiser of the run, and how many updates it has made."""

    count: jax.Array
    rule: optax.OptState


def restarted(rule: optax.GradientTransformation, name: str, restart: Restart) -> optax.GradientTransformation:
    """Return the rule that starts the factors under `name` anew when it is time, and their learning rate with them."""

    def own(path: str) -> bool:
        return path.startswith(f"{name}/")

    inner = unseen(rule, lambda path: own(path) and path.rsplit("/", 1)[1] in PAST)

    def init(params: Params) -> RestartState:
        return RestartState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Params, state: RestartState, params: Params) -> tuple[Params, RestartState]:
        updates, inner_state = inner.update(updates, state.rule, params)
        rise = restart.rise(state.count)
        flat = {path: update * rise if own(path) else update for path, update in tree.flatten(updates).items()}
        count = state.count + 1
        mine, old = {path: update for path, update in flat.items() if own(path)}, tree.flatten(params)
        mine, inner_state = jax.lax.cond(
            restart.begins(count),
            lambda mine, inner_state: _anew(mine, inner_state, old, count // restart.every_steps, restart),
            lambda mine, inner_state: (mine, inner_state),
            mine,
            inner_state,
        )
        return tree.unflatten({**flat, **mine}), RestartState(count, inner_state)

    return optax.GradientTransformation(init, update)


def _anew(
    updates: Mapping[str, jax.Array], state: optax.OptState, params: Mapping[str, jax.Array], number: jax.Array, restart: Restart
) -> tuple[dict[str, jax.Array], optax.OptState]:
    """Return the updates `{path: array}` and the inner state of restart `number`, from 1 on.

    What was zero gets just the number that it is to hold, and B just its negative, so both are exact; A is to rounding.
    """
    key, found = jax.random.fold_in(jax.random.key(restart.seed), number), {}
    for leaf, fields in by_leaf(updates).items():
        a_now, b_now = (params[f"{leaf}/{field}"] + fields[field] for field in "ab")
        *stack, i, rank = a_now.shape
        a, b = restart.make(path_key(key, leaf), (*stack, i, b_now.shape[-1]), rank)
        found[f"{leaf}/a"], found[f"{leaf}/b"] = a - params[f"{leaf}/a"], b - params[f"{leaf}/b"]
        slot = (number - 1) * rank
        found[f"{leaf}/past_a"] = jax.lax.dynamic_update_slice_in_dim(fields["past_a"], a_now, slot, axis=-1)
        found[f"{leaf}/past_b"] = jax.lax.dynamic_update_slice_in_dim(fields["past_b"], b_now, slot, axis=-2)
    shapes = {path: params[path].shape for path in updates}
    return found, pruned(state, shapes, how=restart.prune, ratio=restart.prune_ratio, key=key)


RELORA = LORA
