"""A language model of forty lines: an embedding, stacked residual layers over a running mean of the past, a tied head."""

import jax
import jax.numpy as jnp

from ftjax import weights
from ftjax.kernels.attention import mask
from ftjax.types import Batch, Model

VOCAB, DIM, LAYERS = 17, 8, 3


def init(key):
    embed, up, down = jax.random.split(key, 3)
    return {
        "embed_tokens": {"kernel": jax.random.normal(embed, (VOCAB, DIM)) * 0.5},
        "layers": {
            "mlp": {
                "up_proj": {"kernel": jax.random.normal(up, (LAYERS, DIM, 2 * DIM)) * 0.4},
                "down_proj": {"kernel": jax.random.normal(down, (LAYERS, 2 * DIM, DIM)) * 0.4},
            }
        },
        "norm": {"scale": jnp.ones(DIM)},
    }


def apply(params, tokens, *, positions=None, segment_ids=None, cache=None):
    hidden = weights.embed(tokens, params["embed_tokens"]["kernel"])
    time = jnp.arange(tokens.shape[1])
    past = mask.visible(time[None], time[None], segment_ids, segment_ids, None).astype(jnp.float32)
    past = past / jnp.sum(past, axis=-1, keepdims=True)

    def layer(hidden, params):
        mixed = jnp.einsum("bts,bsd->btd", past, hidden.astype(jnp.float32)).astype(hidden.dtype)
        wide = jnp.tanh(weights.dot(mixed, params["mlp"]["up_proj"]["kernel"]))
        out = weights.dot(wide, params["mlp"]["down_proj"]["kernel"])
        if "bias" in params["mlp"]["down_proj"]:
            out = out + params["mlp"]["down_proj"]["bias"].astype(out.dtype)[None, None]
        for weight in params.get("slots", {}).get("mlp", {}).values():
            out = out + weights.dot(mixed, weight)
        return hidden + out, None

    hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
    return hidden * params["norm"]["scale"].astype(hidden.dtype)[None, None], cache


def head(params):
    return params["embed_tokens"]["kernel"]


def unembed(kernel, hidden):
    return weights.dot_transposed(hidden, kernel).astype(jnp.float32)


MODEL = Model("toy", init, apply, head, unembed)


def batch(key, rows=4, time=9, packed=False) -> Batch:
    """Random tokens, the first third of each row a prompt; with `packed`, two documents a row."""
    positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
    segments = jnp.where(positions >= time // 2, 2, 1) if packed else jnp.ones((rows, time), jnp.int32)
    starts = (positions == 0) | ((positions == time // 2) & packed)
    mask = jnp.where(starts | (positions < time // 3), 0.0, 1.0)
    return Batch(jax.random.randint(key, (rows, time), 0, VOCAB), mask, positions, segments)
