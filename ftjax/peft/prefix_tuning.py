"""Prefix tuning: a few keys and values of its own before every row, in each layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.peft.soft_prompt import PREFIX, Fields, SoftPrompt, linear_layers, mlp, soft_prompt
from ftjax.types import Transform
from ftjax.weights import Leaf

KEYS = "layers/self_attn/k_proj/kernel"
SCALE = 0.02
"""Standard deviation of random keys and values."""


def prefix_tuning(
    num_tokens: int = 20, *, hidden_size: int | None = None, init: str | Fields = "random", name: str = "prefix_tuning"
) -> Transform:
    """Train n keys and values that every query sees, in each layer.

    y = softmax(q [P_k, K]ᵀ / √c) [P_v, V],   P_k, P_v [n, k c] of each layer

    Li and Liang, 2021, arXiv 2101.00190, section 4: 2 n L k c numbers (the keys stand as after the rotary embedding). With `hidden_size`
    m they are the outputs of a network over n trained inputs, which a trained model no longer needs (section 4.3):
    P = tanh(e W1 + b1) W2 + b2, e [n, k c], W1 [k c, m], W2 [m, 2 L k c].

    There is no neutral start: a key of zeros takes a share of the softmax too.

    Args:
      num_tokens: n.
      hidden_size: m; None to train the keys and values themselves.
      init: "random" for N(0, 0.02²) (PEFT draws from N(0, 1), which a trained model is not used to; with the network, e from N(0, 1) and
        the layers as PyTorch's); "zero" for keys and values of zero; or `models.prefix_of(model, params, ids)`, the activations of a text
        of n tokens, the paper's best start (section 7.4): the model then begins as if every row began with that text.
      name: the key in the trainable tree.

    Raises:
      ValueError: there is less than one token or unit, no such init, a text of another length or another model, or the model has no key
        projections.

    Example:
      >>> params = {"layers": {"self_attn": {"k_proj": {"kernel": jnp.ones((2, 8, 4))}}}}
      >>> frozen, trainable = prefix_tuning(3).init(jax.random.key(0), params)
      >>> trainable["prefix_tuning"]["layers"]["slots"]["prefix"]["key"].shape
      (2, 3, 4)
    """
    given = None if isinstance(init, str) else init
    if given is None and init not in ("random", "zero"):
        raise ValueError(f"{name}: init is 'random', 'zero' or the keys and values of a text, not {init!r}.")
    if given is not None and hidden_size is not None:
        raise ValueError(f"{name}: a text gives keys and values and no network that makes them: leave hidden_size or init out.")
    if hidden_size is not None and hidden_size < 1:
        raise ValueError(f"{name}: hidden_size is at least 1, or None for no network, not {hidden_size}.")
    scale = SCALE if init == "random" else 0.0

    def make(key: jax.Array, kernel: Leaf) -> Fields:
        layers, _, width = kernel.shape
        drawn = jax.random.split(jax.random.fold_in(key, 0))
        if hidden_size is None:
            shape = (layers, num_tokens, width)
            if given is not None:
                return _copied(given, shape, name)
            return {field: scale * jax.random.normal(one, shape) for field, one in zip(("key", "value"), drawn, strict=True)}
        fields = linear_layers(key, width, hidden_size, layers * 2 * width)
        if init == "zero":
            fields |= {field: jnp.zeros_like(fields[field]) for field in ("w2", "b2")}
        return {"embedding": jax.random.normal(drawn[0], (num_tokens, width)), **fields}

    options = {"hidden_size": hidden_size, "init": init if given is None else "text"}
    return soft_prompt(make, _feed, name=name, kind="prefix_tuning", slot=PREFIX, reads=KEYS, num_tokens=num_tokens, options=options)


def _copied(given: Fields, shape: tuple[int, ...], name: str) -> Fields:
    found = {field: tuple(x.shape) for field, x in given.items()}
    if found != {"key": shape, "value": shape}:
        raise ValueError(f"{name}: init has {found}, expected a key and a value {shape}.")
    return {field: jnp.array(x, jnp.float32, copy=True) for field, x in given.items()}  # the state is donated, `given` must outlive it


def _feed(fields: Fields) -> Fields:
    if "embedding" not in fields:
        return fields
    return split(mlp(fields["embedding"], fields, jnp.tanh), width=fields["embedding"].shape[1])


def split(flat: jax.Array, *, width: int) -> Fields:
    """Return `[n, l · 2 · w]`, the key and the value of each layer side by side, as key and value `[l, n, w]`."""
    each = flat.reshape(len(flat), -1, 2, width)
    return {"key": each[:, :, 0].swapaxes(0, 1), "value": each[:, :, 1].swapaxes(0, 1)}


PREFIX_TUNING = SoftPrompt(
    peft_type="PREFIX_TUNING",
    slot=PREFIX,
    feed=_feed,
    defaults={"encoder_hidden_size": None, "prefix_projection": False, "init_weights": None},
    writes={
        "encoder_hidden_size": lambda options: options["hidden_size"],
        "prefix_projection": lambda options: options["hidden_size"] is not None,
        "init_weights": lambda options: "zero" if options["init"] == "zero" else None,
    },
    reads={"hidden_size": lambda config: None, "init": lambda config: config["init_weights"] or "random"},  # no network is in the file
)
