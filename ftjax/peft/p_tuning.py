"""P-tuning: a prompt that is trained through a small network, which training then no longer needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.peft.prompt_tuning import EMBEDDING
from ftjax.peft.soft_prompt import PROMPT, Fields, SoftPrompt, linear_layers, mlp, soft_prompt
from ftjax.types import Transform
from ftjax.weights import Leaf


def p_tuning(num_tokens: int = 20, *, hidden_size: int | None = 128, encoder: str = "mlp", name: str = "p_tuning") -> Transform:
    """Train n vectors that every row begins with, as the outputs of a network over trained inputs.

    p = relu(relu(e W1 + b1) W2 + b2) W3 + b3,   e [n, d] from N(0, 1), W1 [d, m], W2 [m, m], W3 [m, d]

    Liu et al., 2021, arXiv 2103.10385, section 3.2, with the form that PEFT has and recommends; the paper's own is a bidirectional LSTM
    and an MLP of two layers. Where we differ: the paper also places virtual tokens inside and behind the input; here, as in PEFT, all
    come first. It trains n d + 2 d m + m² + 2 m + d numbers, of which a model that is used needs p alone, n d: that is what PEFT's folders
    hold.

    Args:
      num_tokens: n.
      hidden_size: m; None for no network: the vectors themselves are trained, as in a folder that was read.
      encoder: "mlp"; "lstm" is refused.
      name: the key in the trainable tree.

    Raises:
      ValueError: there is less than one token or unit, or another encoder.

    Example:
      >>> params = {"embed_tokens": {"kernel": jnp.ones((6, 4))}}
      >>> frozen, trainable = p_tuning(3, hidden_size=5).init(jax.random.key(0), params)
      >>> {field: array.shape for field, array in trainable["p_tuning"]["prompt"].items()}
      {'embedding': (3, 4), 'w1': (4, 5), 'b1': (5,), 'w2': (5, 5), 'b2': (5,), 'w3': (5, 4), 'b3': (4,)}
    """
    if encoder != "mlp":
        raise ValueError(f"{name}: the encoder is 'mlp', not {encoder!r}; the paper's LSTM is not implemented.")
    if hidden_size is not None and hidden_size < 1:
        raise ValueError(f"{name}: hidden_size is at least 1, or None for no network, not {hidden_size}.")

    def make(key: jax.Array, table: Leaf) -> Fields:
        d = table.shape[1]
        embedding = jax.random.normal(jax.random.fold_in(key, 0), (num_tokens, d))
        layers = {} if hidden_size is None else linear_layers(key, d, hidden_size, hidden_size, d)
        return {"embedding": embedding, **layers}

    options = {"hidden_size": hidden_size}
    return soft_prompt(make, _feed, name=name, kind="p_tuning", slot=PROMPT, reads=EMBEDDING, num_tokens=num_tokens, options=options)


def _feed(fields: Fields) -> Fields:
    return {"embedding": mlp(fields["embedding"], fields, lambda x: jnp.maximum(x, 0))}


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
    writes={"encoder_hidden_size": lambda options: options["hidden_size"]},
    reads={"hidden_size": lambda config: None},  # the network is not in the file
)
