"""AdaLoRA: low-rank terms in the form of an SVD, of which training keeps those that matter, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import tree
from ftjax.peft import low_rank
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.lora import LORA, LoraWeight
from ftjax.peft.riding import by_leaf
from ftjax.types import Params, Plan, Transform

START = 0.02
"""Standard deviation of P and Q at the start, as PEFT has it; the paper says Gaussian."""


def adalora(
    targets: tree.Filter = "all-linear",
    *,
    steps: int | None = None,
    init_rank: int = 12,
    target_rank: int = 8,
    alpha: float | None = None,
    warmup_steps: int = 0,
    final_steps: int = 0,
    every_steps: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality_coef: float = 0.1,
    dropout: float = 0.0,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "adalora",
) -> Transform:
    """Add a low-rank term of which the optimiser prunes, over all matrices at once, what matters least.

    y = x W + s · dropout(x) Q Λ P,   s = alpha / init_rank,   Q `[i, r]`, Λ diagonal, P `[r, o]` (the paper's, transposed)
    L = loss + γ Σ (‖QᵀQ - I‖² + ‖PPᵀ - I‖²)                             the gradient that the optimiser gets
    I = |w ∂L/∂w|,  Ī = β₁ Ī + (1 - β₁) I,  U = β₂ U + (1 - β₂) |I - Ī|    for every entry w of Λ, P and Q
    S = Ī U of λ + the mean of Ī U over its column of Q + the mean over its row of P
    λ stays after step t where S is among the b(t) largest of all matrices, else it becomes 0, with
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))³  for t_i < t ≤ T - t_f,   b_0 before and b_T after.

    Zhang et al., 2023, arXiv 2303.10512. The ranking is done every `every_steps`; in between a λ that was pruned still gets its update,
    and so may come back. What stays at t = T - t_f stays.

    A step reports the triplets that are left and the sum without γ.

    PEFT 0.21 differs in training: it takes I after the update of w instead of before, its penalty is γ times the mean of the unsquared
    norms, and it counts steps as its caller does. The factor s is PEFT's, alpha / (init_rank + 1e-5), and so are the files.

    Args:
      targets: which matrices (see `ftjax.tree`).
      steps: T, the length of the run, in updates; needed.
      init_rank: r at the start, from 1 to the smaller side of the matrix.
      target_rank: what is left of it on average, b_T for each matrix.
      alpha: numerator of the scale; `init_rank` if None.
      warmup_steps: t_i, before anything is pruned.
      final_steps: t_f, after the last pruning.
      every_steps: Δ_T, from one ranking to the next.
      beta1: β₁, smoothing of the sensitivity, in (0, 1).
      beta2: β₂, smoothing of its uncertainty, in (0, 1).
      orthogonality_coef: γ ≥ 0.
      dropout: probability, in [0, 1), of zeroing an entry of x on the low-rank path; it acts only where `attach` is given a key.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; an argument is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 8, 6))}}}
      >>> frozen, trainable = adalora(["q_proj"], steps=100, init_rank=3, target_rank=2).init(jax.random.key(0), params)
      >>> [(path.rsplit("/", 1)[1], leaf.shape) for path, leaf in tree.flatten(trainable).items()]
      [('a', (2, 8, 3)), ('b', (2, 3, 6)), ('e', (2, 3))]
    """
    budget = Budget(steps, init_rank, target_rank, warmup_steps, final_steps, every_steps, beta1, beta2, orthogonality_coef)
    budget.check(name)
    if alpha is not None and alpha <= 0:
        raise ValueError(f"{name}: expected alpha > 0, not {alpha}.")
    spec = low_rank.LowRank("adalora", name, targets, init_rank, alpha, False, dropout, exclude, None, None)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        trained = {}
        for path, leaf, rank, leaf_key in spec.matrices(key, params):
            *stack, i, o = leaf.shape
            a_key, b_key = jax.random.split(leaf_key)
            trained[f"{path}/a"] = START * jax.random.normal(a_key, (*stack, i, rank), jnp.float32)
            trained[f"{path}/b"] = START * jax.random.normal(b_key, (*stack, rank, o), jnp.float32)
            trained[f"{path}/e"] = jnp.zeros((*stack, rank), jnp.float32)
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        def leaf(row: low_rank.Joined) -> LoraWeight:
            a = row.fields["a"] * row.fields["e"][..., None, :]
            return LoraWeight(row.base, a, row.fields["b"], row.scale * (init_rank / (init_rank + 1e-5)), *row.dropout)

        return tree.replace(frozen, {row.path: leaf(row) for row in spec.joined(frozen, trainable, key=key)})

    def plan(params: Params) -> tuple[Plan, ...]:
        (row,) = spec.plan(params)
        shown = {"alpha": row.options["alpha"], "dropout": dropout, **budget._asdict()}
        return (row._replace(options=shown),)

    def optimizer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        return budgeted(rule, name, budget)

    def metrics(trainable: Params) -> dict[str, jax.Array]:
        left = sum(jnp.sum(leaf != 0) for path, leaf in tree.flatten(trainable[name]).items() if path.endswith("/e"))
        return {f"{name}_triplets": left.astype(jnp.float32), f"{name}_orthogonality": penalty(trainable[name])}

    method = Transform(init_fn, attach, plan, optimizer, metrics)
    return method if layers is None else on_layers(method, layers)


class Budget(NamedTuple):
    """How many triplets stay, when, and by which measure: the arguments of `adalora`."""

    steps: int
    init_rank: int
    target_rank: int
    warmup_steps: int
    final_steps: int
    every_steps: int
    beta1: float
    beta2: float
    orthogonality_coef: float

    def check(self, name: str) -> None:
        """Refuse what is out of range."""
        if self.steps is None:
            raise ValueError(f"{name}: steps, the length of the run, is needed: the budget falls over the run.")
        if not 1 <= self.target_rank <= self.init_rank:
            raise ValueError(f"{name}: target_rank {self.target_rank} is not from 1 to init_rank {self.init_rank}.")
        if min(self.warmup_steps, self.final_steps) < 0 or self.every_steps < 1 or self.last <= self.warmup_steps:
            raise ValueError(
                f"{name}: no step is left to prune at: steps={self.steps}, warmup_steps={self.warmup_steps}, final_steps="
                f"{self.final_steps}, every_steps={self.every_steps}; expected warmup_steps + final_steps < steps and every_steps >= 1."
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1 and self.orthogonality_coef >= 0):
            raise ValueError(
                f"{name}: expected beta1 and beta2 in (0, 1) and orthogonality_coef >= 0, not {self.beta1}, {self.beta2} and "
                f"{self.orthogonality_coef}."
            )

    @property
    def last(self) -> int:
        """The last step that ranks."""
        return self.steps - self.final_steps

    def triplets(self, matrices: int) -> np.ndarray:
        """Return b(t), int `[last + 1]`, for so many matrices."""
        t = np.arange(self.last + 1)
        start, end = self.init_rank * matrices, self.target_rank * matrices
        left = np.minimum(1.0, 1 - (t - self.warmup_steps) / (self.last - self.warmup_steps))
        return ((start - end) * left**3 + end).astype(np.int32)

    def ranks(self, t: jax.Array) -> jax.Array:
        """Return whether step t, from 1 on, ranks."""
        return (t > self.warmup_steps) & (t <= self.last) & ((t % self.every_steps == 0) | (t == self.last))


class Importance(NamedTuple):
    """The moving averages of one array: what a change of each entry would do to the loss, and how sure that is."""

    sensitivity: jax.Array
    uncertainty: jax.Array

    def update(self, weight: jax.Array, gradient: jax.Array, budget: Budget) -> Importance:
        """Return the averages with one more step in them."""
        now = jnp.abs(weight * gradient)
        sensitivity = budget.beta1 * self.sensitivity + (1 - budget.beta1) * now
        return Importance(sensitivity, budget.beta2 * self.uncertainty + (1 - budget.beta2) * jnp.abs(now - sensitivity))

    def score(self) -> jax.Array:
        """Return the importance of each entry."""
        return self.sensitivity * self.uncertainty


def scores(fields: Mapping[str, Importance]) -> jax.Array:
    """Return S `[..., r]` of the triplets of one leaf."""
    a, b, e = (fields[field].score() for field in "abe")
    return e + jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1)


def largest(found: Mapping[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    """Return `{path: bool [..., r]}`: which are among the `count` largest of all arrays; of equals, the first."""
    flat = jnp.concatenate([scores.reshape(-1) for scores in found.values()])
    place = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
    kept, start = {}, 0
    for path, one in found.items():
        kept[path] = (place[start : start + one.size] < count).reshape(one.shape)
        start += one.size
    return kept


def penalty(trained: Params) -> jax.Array:
    """Return Σ ‖QᵀQ - I‖² + ‖PPᵀ - I‖² over the matrices of a trained tree, without the γ."""
    leaves = by_leaf(tree.flatten(trained)).values()
    return sum(jnp.sum(_off(leaf["a"]) ** 2) + jnp.sum(_off(jnp.swapaxes(leaf["b"], -1, -2)) ** 2) for leaf in leaves)


def _off(x: jax.Array) -> jax.Array:
    """Return xᵀ x - I, `[..., n, r] -> [..., r, r]`."""
    gram = jnp.swapaxes(x, -1, -2) @ x
    return gram - jnp.broadcast_to(jnp.eye(x.shape[-1]), gram.shape)


class BudgetState(NamedTuple):
    """What AdaLoRA remembers beside the optimiser of the run."""

    count: jax.Array
    """Updates made."""
    sensitivity: Params
    uncertainty: Params
    """Both as what is trained: see `Importance`."""
    kept: Params
    """bool, as Λ: what the last ranking left."""
    rule: optax.OptState


def budgeted(rule: optax.GradientTransformation, name: str, budget: Budget) -> optax.GradientTransformation:
    """Return the rule that pulls the factors under `name` to be orthogonal, and prunes their Λ to the budget."""

    def own(leaves: Params) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in tree.flatten(leaves).items() if path.startswith(f"{name}/")}

    def init(params: Params) -> BudgetState:
        mine = {name: params[name]}
        kept = tree.unflatten({path: jnp.ones(leaf.shape, bool) for path, leaf in own(mine).items() if path.endswith("/e")})
        zeros = [jax.tree.map(jnp.zeros_like, mine) for _ in range(2)]
        return BudgetState(jnp.zeros((), jnp.int32), *zeros, kept, rule.init(params))

    def update(updates: Params, state: BudgetState, params: Params) -> tuple[Params, BudgetState]:
        pull = own({name: jax.grad(penalty)(params[name])})
        gradients = {path: g + budget.orthogonality_coef * pull[path] if path in pull else g for path, g in tree.flatten(updates).items()}
        moved, inner_state = rule.update(tree.unflatten(gradients), state.rule, params)
        mine, t = own(params), state.count + 1
        before = zip(own(state.sensitivity).items(), own(state.uncertainty).values(), strict=True)
        importance = {path: Importance(s, u).update(mine[path], gradients[path], budget) for (path, s), u in before}
        kept = _kept(importance, own(state.kept), t, budget)
        flat = tree.flatten(moved)
        for path, stays in kept.items():
            flat[path] = jnp.where(stays | ~(budget.ranks(t) | (t > budget.last)), flat[path], -mine[path])  # p - p is zero exactly
        averages = (tree.unflatten({path: one[n] for path, one in importance.items()}) for n in range(2))
        return tree.unflatten(flat), BudgetState(t, *averages, tree.unflatten(kept), inner_state)

    return optax.GradientTransformation(init, update)


def _kept(importance: Mapping[str, Importance], before: Mapping[str, jax.Array], t: jax.Array, budget: Budget) -> dict[str, jax.Array]:
    """Return what stays after step t: what stayed before, or the largest of now where the step ranks."""
    matrices = sum(kept.size for kept in before.values()) // budget.init_rank
    count = jnp.asarray(budget.triplets(matrices))[jnp.minimum(t, budget.last)]
    now = largest({f"{leaf}/e": scores(fields) for leaf, fields in by_leaf(importance).items()}, count)
    return {path: jnp.where(budget.ranks(t), now[path], stays) for path, stays in before.items()}


ADALORA = Format(
    peft_type="ADALORA",
    tensors={"a": Tensor("lora_A", "ir->ri"), "b": Tensor("lora_B", "ro->or"), "e": Tensor("lora_E", "r->r1")},
    options={
        "steps": "total_step",
        "init_rank": "init_r",
        "target_rank": "target_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "warmup_steps": "tinit",
        "final_steps": "tfinal",
        "every_steps": "deltaT",
        "beta1": "beta1",
        "beta2": "beta2",
        "orthogonality_coef": "orth_reg_weight",
    },
    defaults=LORA.defaults
    | {
        "target_r": 8,
        "init_r": 12,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": None,
        "rank_pattern": None,
    },
    ignored=(*LORA.ignored, "r", "rank_pattern"),
    at_least={"r": "init_rank"},
    scaled="e",
)
