"""P-tuning: a prompt that is trained through a small network, which training then no longer needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.peft.prompt_tuning import EMBEDDING
from ftjax.peft.soft_prompt import PROMPT, Fields, SoftPrompt, linear_layers, mlp, soft_prompt
from ftjax.types import Transform
from ftjax.weights import Leaf

ENCODERS = ("mlp", "lstm")


def p_tuning(
    num_tokens: int = 20, *, hidden_size: int | None = 128, encoder: str = "mlp", num_layers: int = 2, name: str = "p_tuning"
) -> Transform:
    """Train n vectors that every row begins with, as the outputs of a network over trained inputs.

    mlp:    p = relu(relu(e W1 + b1) W2 + b2) W3 + b3,   e [n, d] from N(0, 1), W1 [d, m], W2 [m, m], W3 [m, d]
    lstm:   p = relu(h W1 + b1) W2 + b2,   h [n, 2 m] of an LSTM that reads e in both directions, W1 [2 m, 2 m], W2 [2 m, d]

    Liu et al., 2021, arXiv 2103.10385, section 3.2: the paper's network is the LSTM (equation 5), PEFT recommends the MLP and has both.
    Where we differ: the paper also places virtual tokens inside and behind the input; here, as in PEFT, all come first. A gate has one
    bias, where PyTorch has the sum of two. An MLP trains n d + 2 d m + m² + 2 m + d numbers, of which a model that is used needs p alone,
    n d: that is what PEFT's folders hold.

    Args:
      num_tokens: n.
      hidden_size: m; None for no network: the vectors themselves are trained, as in a folder that was read.
      encoder: "mlp" or "lstm".
      num_layers: of the LSTM, at least 1; from the second on a layer reads both directions of the one below.
      name: the key in the trainable tree.

    Raises:
      ValueError: there is less than one token or unit, or another encoder.

    Example:
      >>> params = {"embed_tokens": {"kernel": jnp.ones((6, 4))}}
      >>> frozen, trainable = p_tuning(3, hidden_size=5).init(jax.random.key(0), params)
      >>> {field: array.shape for field, array in trainable["p_tuning"]["prompt"].items()}
      {'embedding': (3, 4), 'w1': (4, 5), 'b1': (5,), 'w2': (5, 5), 'b2': (5,), 'w3': (5, 4), 'b3': (4,)}
    """
    if encoder not in ENCODERS:
        raise ValueError(f"{name}: the encoder is 'mlp' or 'lstm', not {encoder!r}.")
    if hidden_size is not None and not (isinstance(hidden_size, int) and hidden_size >= 1):
        raise ValueError(f"{name}: hidden_size is at least 1, or None for no network, not {hidden_size!r}.")
    if num_layers < 1:
        raise ValueError(f"{name}: num_layers is at least 1, not {num_layers}.")

    def make(key: jax.Array, table: Leaf) -> Fields:
        d = table.shape[1]
        embedding = jax.random.normal(jax.random.fold_in(key, 0), (num_tokens, d))
        if hidden_size is None:
            layers = {}
        elif encoder == "mlp":
            layers = linear_layers(key, d, hidden_size, hidden_size, d)
        else:
            layers = _lstm_layers(key, d, hidden_size, num_layers) | linear_layers(key, 2 * hidden_size, 2 * hidden_size, d)
        return {"embedding": embedding, **layers}

    options = {"hidden_size": hidden_size, "encoder": encoder, "num_layers": num_layers}
    return soft_prompt(make, _feed, name=name, kind="p_tuning", slot=PROMPT, reads=EMBEDDING, num_tokens=num_tokens, options=options)


def _feed(fields: Fields) -> Fields:
    x, layer = fields["embedding"], 1
    while f"input{layer}" in fields:
        x = _lstm(x, *(fields[f"{field}{layer}"] for field in ("input", "state", "bias")))
        layer += 1
    return {"embedding": mlp(x, fields, lambda x: jnp.maximum(x, 0))}


def _lstm_layers(key: jax.Array, d: int, m: int, count: int) -> Fields:
    """Return `input [2, i, 4 m]`, `state [2, m, 4 m]` and `bias [2, 4 m]` of each layer and direction, U(±1/√m) as in PyTorch."""
    fields, bound = {}, m**-0.5
    for layer in range(1, count + 1):
        shapes = {"input": (2, d if layer == 1 else 2 * m, 4 * m), "state": (2, m, 4 * m), "bias": (2, 4 * m)}
        for index, (field, shape) in enumerate(shapes.items()):
            field_key = jax.random.fold_in(jax.random.fold_in(key, 100 + layer), index)
            fields[f"{field}{layer}"] = jax.random.uniform(field_key, shape, jnp.float32, -bound, bound)
    return fields


def _lstm(x: jax.Array, w: jax.Array, u: jax.Array, bias: jax.Array) -> jax.Array:
    """Return `[n, 2 m]`, the states of an LSTM that reads `[n, i]` forwards and of one that reads it backwards.

    (f, g, o and i are quarters of x W + h U + b, in PyTorch's order i, f, g, o.)   c' = σ(f) c + σ(i) tanh(g),   h' = σ(o) tanh(c')
    """
    m = u.shape[1]

    def step(carry, x):
        h, c = carry
        gates = x + jnp.einsum("dm,dmg->dg", h, u)
        i, f, g, o = (gates[:, at : at + m] for at in range(0, 4 * m, m))
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    read = jnp.einsum("dni,dig->ndg", jnp.stack([x, x[::-1]]), w) + bias[None]
    zeros = jnp.zeros((2, m), x.dtype)
    states = jax.lax.scan(step, (zeros, zeros), read)[1]
    return jnp.concatenate([states[:, 0], states[::-1, 1]], axis=-1)


P_TUNING = SoftPrompt(
    peft_type="P_TUNING",
    slot=PROMPT,
    feed=_feed,
    defaults={
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    },
    writes={
        "encoder_hidden_size": lambda options: options["hidden_size"],
        "encoder_reparameterization_type": lambda options: options["encoder"].upper(),
        "encoder_num_layers": lambda options: options["num_layers"],
    },
    reads={"hidden_size": lambda config: None},  # the network is not in the file
)
