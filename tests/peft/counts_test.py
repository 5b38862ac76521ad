"""How many numbers are trained: what the papers say of their models, by the closed form and by the shapes of the trees."""

import jax
import jax.numpy as jnp
import pytest

from ftjax import peft, tree

ROBERTA_BASE, ROBERTA_LARGE, GPT2_MEDIUM, GPT3 = (12, 768), (24, 1024), (24, 1024), (96, 12288)
QV = ["q_proj", "v_proj"]


def blocks(layers, d, kv=None, f=None):
    """The shapes of a stack of layers; as many heads of keys and values as `kv` channels, and `f` inside the feed-forward block."""
    sides = {"q_proj": (d, d), "k_proj": (d, kv or d), "v_proj": (d, kv or d), "o_proj": (d, d), "down_proj": (f or 4 * d, d)}
    return {"layers": {name: {"kernel": jax.ShapeDtypeStruct((layers, *side), jnp.float32)} for name, side in sides.items()}}


@pytest.mark.parametrize(
    ("method", "shape", "count", "millions"),
    [
        # LoRA, arXiv 2106.09685: 2 · matrices · d · r. Its table 3 prints 0.35 M for GPT-2 M, which no rank gives; the form gives 0.39 M.
        (peft.lora(QV, rank=8), ROBERTA_BASE, 2 * 24 * 768 * 8, "0.3"),
        (peft.lora(QV, rank=8), ROBERTA_LARGE, 2 * 48 * 1024 * 8, "0.8"),
        (peft.lora(QV, rank=4), GPT2_MEDIUM, 2 * 48 * 1024 * 4, "0.4"),
        (peft.lora(QV, rank=1), GPT3, 2 * 192 * 12288, "4.7"),
        # VeRA, arXiv 2310.11454: matrices · (d + r).
        (peft.vera(QV, rank=1024), ROBERTA_BASE, 24 * (768 + 1024), "0.043"),
        (peft.vera(QV, rank=256), ROBERTA_LARGE, 48 * (1024 + 256), "0.061"),
        (peft.lora_fa(QV, rank=8), ROBERTA_BASE, 24 * 768 * 8, "0.1"),
        (peft.dora(QV, rank=8), ROBERTA_BASE, 24 * (2 * 768 * 8 + 768), "0.3"),
        # IA3, arXiv 2205.05638: layers · (d_k + d_v + d_ff).
        (peft.ia3(), GPT2_MEDIUM, 24 * (1024 + 1024 + 4096), "0.1"),
        (peft.hira(QV, rank=8), ROBERTA_BASE, 24 * 2 * 768 * 8, "0.3"),
        (peft.loha(QV, rank=8), ROBERTA_BASE, 24 * 4 * 768 * 8, "0.6"),
        (peft.miss(QV, rank=64), ROBERTA_BASE, 24 * 768 * 64, "1.2"),
        (peft.oft(QV, block_size=32), ROBERTA_BASE, 24 * 768 // 32 * (32 * 31 // 2), "0.3"),
        (peft.lora(QV, rank=8, layers="last 3"), ROBERTA_BASE, 2 * 6 * 768 * 8, "0.1"),
    ],
)  # fmt: skip
def test_as_many_numbers_are_trained_as_the_papers_count(key, method, shape, count, millions):
    trainable = jax.eval_shape(method.init, key, blocks(*shape))[1]
    assert tree.size(trainable) == count
    assert f"{count / 1e6:.{len(millions) - 2}f}" == millions


def test_grouped_heads_count_by_their_own_sides(key):
    trainable = jax.eval_shape(peft.lora("all-linear", rank=2).init, key, blocks(3, 64, kv=16, f=160))[1]
    assert tree.size(trainable) == 3 * 2 * (2 * (64 + 64) + 2 * (64 + 16) + (160 + 64))
