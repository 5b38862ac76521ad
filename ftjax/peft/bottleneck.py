"""Bottleneck adapters: a small network of two layers that runs on a module's output, or beside the module on its input."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax import tree, weights
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.lora import widen
from ftjax.peft.riding import Make, added, as_last, by_leaf, check_known, check_range, riding, uniform
from ftjax.types import Params, Transform, pytree, static
from ftjax.weights import Leaf, Weight, Wrapper

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@pytree
class Bottleneck(Weight):
    """`dot(x) = scale · (f(x down + down_bias) up + up_bias)`; a matrix, `scale · down up`, only where f is the identity."""

    down: jax.Array
    """float32 `[..., d, m]`."""
    up: jax.Array
    """float32 `[..., m, d]`."""
    down_bias: jax.Array | None = None
    """float32 `[..., m]`."""
    up_bias: jax.Array | None = None
    """float32 `[..., d]`."""
    scale: float = static(default=1.0)
    activation: str = static(default="identity")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.down.shape[:-1], self.up.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        return self.down.dtype

    def materialize(self) -> jax.Array:
        self.check_linear()
        return self.scale * jnp.matmul(self.down, self.up)

    def dot(self, x: jax.Array) -> jax.Array:
        return self.delta(x).astype(x.dtype)

    def delta(self, x: jax.Array) -> jax.Array:
        """Return `dot(x)` in float32."""
        low = checkpoint_name(weights.dot(x.astype(jnp.float32), self.down), weights.LOW_RANK)
        low = low if self.down_bias is None else low + as_last(self.down_bias, low)
        y = widen(ACTIVATIONS[self.activation](low) * self.scale, self.up)
        return y if self.up_bias is None else y + as_last(self.scale * self.up_bias, y)

    def check_linear(self) -> None:
        """Refuse to be a matrix where it is none."""
        if self.activation != "identity" or self.down_bias is not None or self.up_bias is not None:
            raise ValueError(
                f"bottleneck: with the activation {self.activation!r} it is no matrix and cannot be merged into one: keep the adapter "
                "beside its model (`ftjax generate --adapter=…`), or train one with activation='identity'."
            )


@pytree
class Serial(Wrapper):
    """`dot(x) = h + net(h)` with `h = x base`; `materialize() == base + base @ net` where the net is linear."""

    base: Leaf
    """`[..., i, d]`."""
    net: Bottleneck

    def materialize(self) -> jax.Array:
        self.net.check_linear()
        base = weights.materialize(self.base)
        return added(base, self.net.scale * jnp.matmul(jnp.matmul(base.astype(jnp.float32), self.net.down), self.net.up))

    def dot(self, x: jax.Array) -> jax.Array:
        return self._after(checkpoint_name(weights.dot(x, self.base), weights.PRODUCT))

    def embed(self, ids: jax.Array) -> jax.Array:
        return self._after(weights.embed(ids, self.base))

    def _after(self, h: jax.Array) -> jax.Array:
        return added(h, self.net.delta(h))


def bottleneck(
    targets: tree.Filter = ("o_proj", "down_proj"),
    *,
    reduction: int = 16,
    width: int | None = None,
    activation: str = "gelu",
    scale: float = 1.0,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "bottleneck",
) -> Transform:
    """Run the output of a projection through a small network with a residual connection.

    y = h + s · (f(h D + b_D) U + b_U),   h = x W,   D random, U and the biases zero at the start

    Houlsby et al., 2019, arXiv 1902.00751, section 2.1: after the output projection of attention and after that of the MLP, before the
    residual addition, as `targets` says by default; 2 d m + m + d numbers each. `targets=("down_proj",)` with `activation="relu"` is
    Pfeiffer et al., 2020, arXiv 2005.00247 and 2005.00052: after the MLP alone. Where we differ: U starts at zero, so the model is
    unchanged exactly, not nearly; there is no norm of its own; a bias of the projection is added after the adapter (b_D can take it up).
    In Gemma the adapter stands before the norm that follows attention or MLP. PEFT has none of these.

    With the activation "identity" there are no biases, and the adapter can be merged: W (1 + s D U).

    Args:
      targets: which projections (see `ftjax.tree`); d is their output.
      reduction: m = d / reduction, rounded down.
      width: m itself, from 1 to d, whatever the reduction.
      activation: f, a key of `ACTIVATIONS`.
      scale: s.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the width does not fit; there is no such activation.

    Example:
      >>> params = {"layers": {"mlp": {"down_proj": {"kernel": jnp.ones((2, 6, 4))}}}}
      >>> frozen, trainable = bottleneck(["down_proj"], width=3).init(jax.random.key(0), params)
      >>> tree.size(trainable) == 2 * (2 * 4 * 3 + 3 + 4)
      True
    """
    net = partial(Bottleneck, scale=scale, activation=activation)
    make = _maker(name, reduction, width, activation)
    options = {"width": width, "activation": activation, "scale": scale} | ({} if width else {"reduction": reduction})
    return riding(
        make,
        lambda base, **fields: Serial(base, net(**fields)),
        name=name,
        targets=targets,
        exclude=exclude,
        layers=layers,
        options=options,
    )


def parallel_bottleneck(
    targets: tree.Filter = ("down_proj",),
    *,
    reduction: int = 16,
    width: int | None = None,
    activation: str = "relu",
    scale: float = 4.0,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "parallel_bottleneck",
) -> Transform:
    """Run a small network beside the MLP, or beside attention, on the same input, and add what it says to the output.

    y = module(x) + s · (f(x D + b_D) U + b_U),   D random, U and the biases zero at the start

    He et al., 2022, arXiv 2110.04366, section 3.3 and table 1: the parallel adapter, of the MLP with s = 4; 2 d m + m + d numbers each.
    x is what the module reads, after the norm before it; in Gemma the sum goes through the norm that follows. It fills the slot
    `layers/slots/mlp/<name>` (or `self_attn`) of the model and is no part of any matrix, so it cannot be merged. PEFT has none.

    Args:
      targets: the output projection of the modules that it runs beside: `down_proj` of the MLP, `o_proj` of attention.
      reduction: m = d / reduction, rounded down.
      width: m itself, from 1 to d, whatever the reduction.
      activation: f, a key of `ACTIVATIONS`; with "identity" there are no biases.
      scale: s.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree and of the slot.

    Raises:
      ValueError: as `bottleneck`; or a target is not the output projection of attention or MLP.
    """
    net = partial(Bottleneck, scale=scale, activation=activation)
    shapes = _maker(name, reduction, width, activation)

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        _slot(path, name)
        return shapes(key, path, shape)

    options = {"width": width, "activation": activation, "scale": scale} | ({} if width else {"reduction": reduction})
    inner = riding(make, Serial, name=name, targets=targets, exclude=exclude, options=options)

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        arrays = by_leaf(tree.flatten(trainable[name]))
        check_known(name, arrays, tree.flatten(frozen))
        return tree.combine(frozen, tree.unflatten({_slot(path, name): net(**fields) for path, fields in arrays.items()}))

    transform = Transform(inner.init, attach, inner.plan)
    return transform if layers is None else on_layers(transform, layers)


def _maker(name: str, reduction: int, width: int | None, activation: str) -> Make:
    """Return what makes the arrays of one adapter after, or beside, an output of a matrix's size."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: there is no activation {activation!r}; nearest: {tree.nearest(activation, ACTIVATIONS)}.")
    if width is None and reduction < 1:
        raise ValueError(f"{name}: reduction is a number from 1, by which the width is less than the output, not {reduction}.")

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        *stack, _, d = shape
        m = d // reduction if width is None else width
        check_range(name, "width", m, d, path, shape)
        matrices = {"down": uniform(key, (*stack, d, m), d), "up": jnp.zeros((*stack, m, d))}
        biases = {"down_bias": jnp.zeros((*stack, m)), "up_bias": jnp.zeros((*stack, d))}
        return matrices if activation == "identity" else matrices | biases

    return make


def _slot(path: str, name: str) -> str:
    """Return the slot beside the module whose output projection is at a path."""
    found = re.fullmatch(r"layers/(?:(mlp)/down_proj|(self_attn)/o_proj)/kernel", path)
    if not found:
        raise ValueError(f"{name}: {path!r} is not the output projection of attention or MLP: target o_proj or down_proj.")
    return f"layers/slots/{found[1] or found[2]}/{name}"
