"""What a method that stands for a matrix keeps at every shape, rank and dtype: a new one joins by a line in KINDS or WITHOUT."""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax import peft, tree, weights
from ftjax.peft import inits
from ftjax.types import Transform

STACK, ALONE = "layers/mlp/down_proj/kernel", "embed_tokens/kernel"
WITHOUT = {"bitfit", "full", "neftune", "norm_tuning", "parallel_bottleneck", "value_head", *peft.SOFT_PROMPTS}
"""Methods that make no matrix of a frozen one."""
few = partial(settings, deadline=None, derandomize=True)


class Kind(NamedTuple):
    make: Callable[[int, tuple[int, ...]], Transform]
    """`(size, shape [..., i, o]) -> method`, where the size is a rank, a width, a block or a number of tokens."""
    fits: Callable[[int, tuple[int, ...]], bool] = lambda rank, shape: 1 <= rank <= min(shape[-2:])
    """Whether the method takes this size for this shape; what it does not take, it must refuse."""
    refuses: str = ""
    """Who refuses, if not the method."""
    exact: bool = True
    """Whether it starts at the dense matrix."""


def of(method, size="rank", targets="everything", **options):
    """Return the maker of a method whose option `size` is drawn."""
    return lambda n, shape: method(targets, **({size: n} if size else {}), **options)


def normal(shape):
    return jax.random.normal(jax.random.key(3), shape, jnp.float32)


def calibrated(init):
    """Return the maker of a LoRA whose init knows the inputs, or the gradient, of the matrix."""

    def make(rank, shape):
        if init is inits.lora_ga:
            known = normal(shape)
        else:
            x = normal((*shape[:-1], 4 * shape[-2]))
            known = x @ jnp.swapaxes(x, -1, -2)
        return peft.lora("everything", rank=rank, init=init({STACK: known, ALONE: known}))

    return make


def divides(n, size):
    return n > 0 and size % n == 0


KINDS = {
    **{init: Kind(of(peft.lora, alpha=3, init=init)) for init in ("uniform", "gaussian", "a_zero", "pissa", "olora")},
    "orthogonal": Kind(
        of(peft.lora, init="orthogonal"), lambda r, shape: r % 2 == 0 and 2 <= r <= min(shape[-2:]), "lora:|inits: orthogonal"
    ),
    **{init.__name__: Kind(calibrated(init)) for init in (inits.eva, inits.corda)},
    "lora_ga": Kind(calibrated(inits.lora_ga), lambda r, shape: 2 <= 2 * r <= min(shape[-2:]), "lora:|inits: lora_ga"),
    "lora_fa": Kind(of(peft.lora_fa)),
    "dora": Kind(of(peft.dora, alpha=3)),
    "adalora": Kind(of(peft.adalora, "init_rank", target_rank=1, steps=9)),
    "delta_lora": Kind(of(peft.delta_lora)),
    "delta_lora_later": Kind(of(peft.delta_lora, start_steps=3)),
    "relora": Kind(of(peft.relora, restarts=2), lambda r, shape: 1 <= r and 3 * r <= min(shape[-2:])),
    "loftq": Kind(of(peft.loftq, format="int4", group=2), lambda r, shape: 1 <= r <= min(shape[-2:]) and shape[-2] % 2 == 0, exact=False),
    "vera": Kind(of(peft.vera), lambda r, shape: r >= 1),
    "randlora": Kind(of(peft.randlora, alpha=1)),
    "loha": Kind(of(peft.loha, alpha=3)),
    "lokr": Kind(of(peft.lokr, alpha=3)),
    "lokr_both": Kind(of(peft.lokr, decompose_both=True)),
    "hira": Kind(of(peft.hira)),
    "miss": Kind(of(peft.miss), lambda r, shape: 1 <= r <= shape[-2]),
    "miss_mini": Kind(of(peft.miss, form="mini", mini_rank=2), lambda r, shape: 1 <= r <= shape[-2] and shape[-1] % 2 == 0),
    "miss_bat": Kind(of(peft.miss, form="bat"), lambda r, shape: divides(r, shape[-2]) and divides(r, shape[-1])),
    "shira": Kind(of(peft.shira), lambda r, shape: 1 <= r <= shape[-2] * shape[-1] // (shape[-2] + shape[-1])),
    "oft": Kind(of(peft.oft, "block_size"), lambda n, shape: n >= 2 and divides(n, shape[-2])),
    "oft_series": Kind(of(peft.oft, "block_size", neumann_terms=5, share=True), lambda n, shape: n >= 2 and divides(n, shape[-2])),
    "boft": Kind(of(peft.boft, "block_size"), lambda n, shape: n >= 2 and divides(n, shape[-2])),
    "boft_butterfly": Kind(of(peft.boft, "block_size", factors=2), lambda n, shape: n % 2 == 0 and divides(2 * n, shape[-2])),
    "ia3": Kind(of(peft.ia3, None, feedforward=None), lambda _, shape: True),
    "ia3_inputs": Kind(of(peft.ia3, None, feedforward="everything"), lambda _, shape: True),
    "bottleneck": Kind(of(peft.bottleneck, "width", activation="identity"), lambda m, shape: 1 <= m <= shape[-1]),
    "tokens": Kind(lambda n, shape: peft.tokens(range(n), targets="everything"), lambda n, shape: len(shape) == 2 and 1 <= n <= shape[-2]),
}
# Hypothesis begins with what stands first: rank 2 of a stack of oblong matrices.
STACKS, SIZES, SIDES = ((3,), (), (1,)), (2, 3, 4, 5, 6, 8, 12, 1, 0), (6, 8, 9, 12, 2, 3, 4)
DRAWN = [(size, (*stack, i, o)) for stack, size, i, o in itertools.product(STACKS, SIZES, SIDES, SIDES[::-1])]


@cache
def drawn(name, fits=True):
    """What there is to draw: sizes that fit a shape, or that do not."""
    return [(size, shape) for size, shape in DRAWN if KINDS[name].fits(size, shape) == fits]


def params_of(array):
    return tree.unflatten({STACK if array.ndim > 2 else ALONE: array})


@partial(jax.jit, static_argnums=0)
def read(method, key, base, move, x, y, ids):
    """What a model reads of the leaf, layer by layer, and what merging makes of it: at the start, and moved by so much."""
    frozen, start = method.init(key, params_of(base))

    def of_layer(w):
        return weights.dot(x, w), weights.dot_transposed(y, w), weights.embed(ids, w)

    def at(trainable):
        (leaf,) = tree.flatten(method.attach(frozen, trainable)).values()
        return (*(jax.lax.map(of_layer, leaf) if len(leaf.shape) > 2 else of_layer(leaf)), weights.materialize(leaf))

    return jax.lax.map(at, jax.tree.map(lambda leaf, by: jnp.stack([leaf, leaf + by]), start, move))


def assert_reads(found, dense, base, inputs):
    """Compare with the products of a dense array in float64, to roundings of the largest sum of magnitudes."""
    dtype, ids = base.dtype, inputs[2]
    dense, base, x, y = (np.float64(array) for array in (dense, base, *inputs[:2]))
    expected = {
        "dot": lambda m, x, y: np.einsum("bti,...io->...bto", x, m),
        "dot_transposed": lambda m, x, y: np.einsum("to,...io->...ti", y, m),
        "embed": lambda m, x, y: np.take(m, ids, axis=-2),
        "materialize": lambda m, x, y: m,
    }
    for (name, of_dense), got in zip(expected.items(), found, strict=True):
        assert got.dtype == dtype, name
        largest = of_dense(np.abs(dense) + np.abs(base), np.abs(x), np.abs(y)).max()
        tolerance = 4 * float(jnp.finfo(dtype).eps) * largest
        np.testing.assert_allclose(np.float64(got), of_dense(dense, x, y), rtol=0, atol=tolerance, err_msg=name)


def method_of(name):
    size, shape = drawn(name)[0]
    return KINDS[name].make(size, shape).plan(params_of(jnp.zeros(shape)))[0].known_as


def test_every_method_is_listed():
    assert set(map(method_of, KINDS)) | WITHOUT == set(peft.METHODS)


@pytest.mark.parametrize("name", KINDS)
def test_it_starts_as_the_matrix_and_every_product_is_that_of_what_it_materializes(name):
    @few(max_examples=2)  # each is compiled
    @given(st.sampled_from(drawn(name)), st.sampled_from([jnp.float32, jnp.bfloat16]), st.integers(0, 99))
    def law(fit, dtype, seed):
        method, random, (*_, i, o) = KINDS[name].make(*fit), np.random.default_rng(seed), fit[1]
        base, x, y = (jnp.asarray(random.standard_normal(shape), dtype) for shape in (fit[1], (2, 3, i), (5, o)))
        inputs = x, y, jnp.asarray(random.integers(i, size=(2, 4)), jnp.int32)
        key = jax.random.key(seed, impl="unsafe_rbg")  # whose programs are small
        trained = jax.eval_shape(method.init, key, params_of(base))[1]
        move = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), trained)
        at_start, after = zip(*jax.device_get(read(method, key, base, move, *inputs)), strict=True)
        if KINDS[name].exact:
            assert_reads(at_start, base, base, inputs)
        assert not np.array_equal(after[-1], base)
        assert_reads(after, after[-1], base, inputs)

    law()


@pytest.mark.parametrize("name", [name for name in KINDS if drawn(name, fits=False)])
def test_a_size_that_does_not_fit_is_refused_by_name(name, key):
    @few(max_examples=15)
    @given(st.sampled_from(drawn(name, fits=False)))
    def law(misfit):
        size, shape = misfit
        with pytest.raises(ValueError, match=f"^({KINDS[name].refuses or method_of(name)})"):
            jax.eval_shape(lambda key: KINDS[name].make(size, shape).init(key, params_of(jnp.zeros(shape)))[1], key)

    law()
