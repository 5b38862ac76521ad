"""LoRA-FA: LoRA with a frozen A, so that the backward pass keeps r numbers of a token instead of its whole input."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from ftjax import tree
from ftjax.peft import inits, low_rank
from ftjax.peft.inits import Init
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.lora import LORA, ride
from ftjax.types import Params, Transform


def lora_fa(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    init: Init | str = "uniform",
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Layers | None = None,
    name: str = "lora_fa",
) -> Transform:
    """Add a low-rank term of which only the second factor is trained.

    y = x W + s · dropout(x) A B,   A random and frozen,   s = alpha / rank   (rsLoRA: alpha / √rank)

    Zhang et al., 2023, arXiv 2308.03303. The gradient of B needs x A and not x, so an input that nothing else keeps is not kept
    (with dropout its mask is). A lies in the frozen tree at `lora_fa/<path>/a`: the optimiser never sees it, and `init` with the same key
    makes the same one. A PEFT folder holds it as a plain LoRA's, so it reads back as `lora`. PEFT's LoRA-FA optimiser also preconditions
    the gradient by the inverse of A Aᵀ, which the paper's does not.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None.
      rslora: divide by √rank instead of rank.
      dropout: probability, in [0, 1), of zeroing an entry of x on the low-rank path; it acts only where `attach` is given a key.
      init: how A starts (see `ftjax.peft.lora`); one that starts it at zero would never learn and is refused.
      exclude: matrices to leave out among the targets.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable and in the frozen tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; a rank, alpha, dropout or init is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = lora_fa(["q_proj"], rank=2).init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'lora_fa/layers/q_proj/kernel/b': (2, 2, 6)}
    """
    if init == "a_zero":
        raise ValueError(f"{name}: with init 'a_zero' the frozen A would be zero and B get no gradient; use 'uniform' or 'gaussian'.")
    make = inits.blind(init, name)
    spec = low_rank.LowRank("lora_fa", name, targets, rank, alpha, rslora, dropout, exclude, rank_pattern, alpha_pattern)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        fixed, trained = {}, {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(key, params):
            fixed[f"{path}/a"], trained[f"{path}/b"] = make(leaf_key, leaf.shape, leaf_rank)
        return {**params, name: tree.unflatten(fixed)}, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        if name not in frozen:
            raise ValueError(f"{name}: the frozen tree has no {name!r} with the frozen A; use the one that init returned.")
        model = {part: branch for part, branch in frozen.items() if part != name}
        return ride(spec, model, {name: tree.combine(frozen[name], trainable[name])}, key=key)

    method = Transform(init_fn, attach, spec.plan)
    return method if layers is None else on_layers(method, layers)


LORA_FA = LORA._replace(tensors={**LORA.tensors, "a": LORA.tensors["a"]._replace(trained=False)})
