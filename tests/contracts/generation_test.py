"""What the engine writes with any method, over plain and packed matrices, is what the trainer's full forward pass would choose.

A token is the trainer's choice after the tokens before it, for every token: so, by induction, the whole is what the trainer would decode
without a cache, and one pass tells. To compile little a program has several methods, each on leaves of its own, and a base that is packed
in part: attention and MLP have both plain matrices and NF4.
"""

import dataclasses
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, quant, rollout, scoring, tree, weights
from ftjax.models.apart import Turned
from ftjax.types import VALUE_HEAD, Batch
from tests import tiny
from tests.contracts.methods_test import EXAMPLES

MODEL = models.build(dataclasses.replace(tiny.MODEL.config, attention_bias=True, mlp_bias=True))
PACKED = quant.quantized("nf4", "layers/.*(q|k|v|down)_proj/kernel", group=4, nested=True)
TOGETHER = [
    ("bitfit", "norm_tuning", "tokens", "bottleneck"),
    ("full", "parallel_bottleneck", "value_head"),
    ("prefix_tuning", "prompt_tuning"),
    ("p_tuning", "neftune"),
    ("loftq",),
]
"""Methods that are no other form of any matrix, and LoftQ, which packs by itself. All others ride on matrices."""
RIDING = sorted(set(peft.METHODS) - {name for names in TOGETHER for name in names})
PLACES = ("layers/self_attn/.*kernel", "layers/mlp/.*kernel")


def riding(name, targets):
    """Return the last example of a method on other leaves."""
    make = EXAMPLES[name][-1]
    return make.func(targets, **{option: value for option, value in make.keywords.items() if option not in ("exclude", "feedforward")})


def cases():
    """Return `{id: (how the base is packed, the method)}`."""
    found = {"+".join(names): (PACKED, peft.chain(*(EXAMPLES[name][-1]() for name in names))) for names in TOGETHER}
    found["loftq"] = None, found["loftq"][1]
    for pair in (RIDING[n : n + len(PLACES)] for n in range(0, len(RIDING), len(PLACES))):
        found["+".join(pair)] = PACKED, peft.chain(*map(riding, pair, PLACES))
    projections = ("q", "k", "v", "o", "gate", "up", "down")
    packing = [method(f"layers/.*/{at}_proj/kernel", group=4) for at, method in zip(projections, quant.METHODS.values(), strict=False)]
    return found | {"lora over all formats": (peft.chain(*packing), EXAMPLES["lora"][-1]())}


CASES = cases()
SIZE = {"slots": 2, "slot_tokens": 16, "read_tokens": 16, "block": 4}
PROMPTS, WRITTEN = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]), 7


@cache
def base(packing=None):
    """The model of `tests.tiny` with biases, which bias tuning has to find."""
    if packing is not None:
        return packing.init(jax.random.key(0), base())[0]
    flat = tree.flatten(jax.jit(MODEL.init)(jax.random.key(0)))
    wave = lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
    return tree.unflatten({path: wave(leaf) if path.endswith("bias") else leaf for path, leaf in flat.items()})


def moved(trainable):
    """Return the trainable tree away from its start."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape).astype(x.dtype), jax.device_get(trainable))


@partial(jax.jit, static_argnames="model")
def trainer(model, params, batch):
    return scoring.score(model, params, batch, outputs=("logps", "greedy"))


def as_batch(samples):
    """Prompts with what was written, of which alone is asked."""
    tokens, mask, segments = (np.zeros((len(samples), SIZE["slot_tokens"]), kind) for kind in (np.int32, np.float32, np.int32))
    for row, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        whole = [*prompt, *sample.tokens]
        tokens[row, : len(whole)], segments[row, : len(whole)], mask[row, len(prompt) : len(whole)] = whole, 1, 1
    positions = np.broadcast_to(np.arange(SIZE["slot_tokens"], dtype=np.int32), tokens.shape)
    return Batch(tokens, mask, positions, segments)


def test_there_is_a_matrix_in_every_format():
    leaves = tree.flatten(base(CASES["lora over all formats"][0])).values()
    assert {leaf.format for leaf in leaves if isinstance(leaf, quant.PackedWeight)} == set(quant.METHODS)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_the_trainer_would_choose(case, key):
    packing, method = CASES[case]
    frozen, start = method.init(key, base(packing))
    trained = moved(start)
    attached = method.attach(frozen, trained)
    samples = rollout.Engine(MODEL, **SIZE).generate(attached, [rollout.Request(prompt, WRITTEN) for prompt in PROMPTS])
    batch = as_batch(samples)
    counted = batch.loss_mask > 0

    def said(params):
        scores = trainer(MODEL, params, batch)
        return np.asarray(scores.greedy)[counted], np.asarray(scores.logps)[counted]

    chosen, logps = said(attached)
    assert len(chosen) == WRITTEN * len(PROMPTS) and len({tuple(sample.tokens) for sample in samples}) > 1
    np.testing.assert_array_equal(chosen, 1)
    np.testing.assert_allclose(np.concatenate([sample.logps for sample in samples]), logps, rtol=0, atol=1e-5)
    for name in set(start) - {VALUE_HEAD}:  # each has its say
        assert np.abs(said(method.attach(frozen, trained | {name: start[name]}))[1] - logps).max() > 1e-3, name


@pytest.mark.parametrize("case", CASES)
def test_laid_apart_in_half_precision_every_matrix_multiplies_as_before(case, monkeypatch):
    monkeypatch.setattr(sys.modules[models.apart.__module__], "TURNS", True)
    packing, method = CASES[case]
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, base())
    frozen, trainable = method.init(jax.random.key(1), halved if packing is None else packing.init(jax.random.key(0), halved)[0])
    params = jax.tree.map(jnp.asarray, method.attach(frozen, moved(trainable)))
    first, *_ = models.apart(params)["layers"]
    turned = 0
    for path, leaf in tree.flatten(first).items():
        if not tree.predicate(tree.ALL_LINEAR)(f"layers/{path}"):
            continue
        before = jax.tree.map(lambda x: x[0], tree.flatten(params["layers"])[path])
        turned += any(isinstance(part, Turned) for part in jax.tree.leaves(leaf, is_leaf=lambda part: isinstance(part, Turned)))
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, before.shape[0])), jnp.bfloat16)
        found, expected = (np.asarray(weights.dot(x, weight), np.float32) for weight in (leaf, before))
        np.testing.assert_allclose(found, expected, atol=2**-7 * np.abs(expected).max(), err_msg=path)
    assert bool(turned) == (case != "loftq")  # which packs every matrix
