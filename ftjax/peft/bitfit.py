"""BitFit and norm tuning: the small vectors of a model that are there already."""

from __future__ import annotations

import jax

from ftjax import tree
from ftjax.peft.full import full
from ftjax.peft.layers import Layers
from ftjax.types import Params, Plan, Transform

BIASES = r"(.*/)?bias"


def bitfit(
    targets: tree.Filter = BIASES, *, exclude: tree.Filter | None = None, layers: Layers | None = None, name: str = "bitfit"
) -> Transform:
    """Train the biases and nothing else.

    Ben Zaken et al., 2021, arXiv 2106.10199. Biases that exist: Qwen2 has them at q, k and v, Llama and its relatives have none. The paper
    trains the task's head too: `chain(bitfit(), full("lm_head/kernel"))`. It is `full` on a filter, under a name of its own. PEFT has it
    beside a LoRA (`bias="all"`): `chain(lora(), bitfit())`.

    Args:
      targets: which biases (see `ftjax.tree`); `r".*/q_proj/bias"` trains those of the queries, of which the paper needs no more.
      exclude: leaves to leave frozen among them.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: the model has no biases; nothing matched; there is no such layer.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.zeros((2, 6))}}}
      >>> frozen, trainable = bitfit().init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'bitfit/layers/q_proj/bias': (2, 6)}
    """
    inner = full(targets, exclude=exclude, layers=layers, name=name)

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        _check(params, name)
        return inner.init(key, params)

    def plan(params: Params) -> tuple[Plan, ...]:
        _check(params, name)
        return tuple(row._replace(kind="bitfit") for row in inner.plan(params))

    return Transform(init, inner.attach, plan)


def _check(params: Params, name: str) -> None:
    if not tree.filter_paths(tree.flatten(params), BIASES):
        raise ValueError(
            f"{name}: this model has no biases to train. norm_tuning() trains vectors that every model has; lora() adds new ones."
        )


def norm_tuning(
    targets: tree.Filter = "norms", *, exclude: tree.Filter | None = None, layers: Layers | None = None, name: str = "norm_tuning"
) -> Transform:
    """Train the scales of the norms and nothing else.

    Zhao et al., 2024, arXiv 2312.11420; PEFT calls it LN tuning. It is `full` on a filter, under a name of its own.

    Args:
      targets: which norms (see `ftjax.tree`).
      exclude: leaves to leave frozen among them.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`); then no leaf may be outside the layers.
      name: the key in the trainable tree.

    Raises:
      ValueError: nothing matched; there is no such layer.
    """
    inner = full(targets, exclude=exclude, layers=layers, name=name)
    return inner._replace(plan=lambda params: tuple(row._replace(kind="norm_tuning") for row in inner.plan(params)))
