"""A lazy tensor reads any block as if it were in memory."""

import ml_dtypes
import numpy as np
import pytest

from ftjax.hf import lazy

ARRAY = np.arange(24, dtype=np.float32).reshape(4, 6)
BF16 = np.dtype(ml_dtypes.bfloat16)
VIEWS = {
    "plain": (lazy.from_array, ARRAY),
    "swapped": (lambda x: lazy.swap(lazy.from_array(x)), ARRAY.T),
    "cast": (lambda x: lazy.cast(lazy.from_array(x), BF16), ARRAY.astype(BF16)),
    "aligned": (lambda x: lazy.aligned(lazy.from_array(x)), ARRAY),
    "stacked": (lambda x: lazy.stack([lazy.from_array(x), lazy.from_array(-x)]), np.stack([ARRAY, -ARRAY])),
    "all": (lambda x: lazy.stack([lazy.cast(lazy.swap(lazy.from_array(x)), BF16)] * 3), np.stack([ARRAY.T.astype(BF16)] * 3)),
}
INDICES = [(), (slice(1, 2),), (slice(0, 2), slice(1, 3)), (slice(None), slice(2, None)), (slice(1, 1), slice(0, 3))]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_block_is_the_block_of_the_whole(view, index):
    make, expected = VIEWS[view]
    tensor = make(ARRAY)
    assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
    block = tensor.read(index)
    assert block.dtype == expected.dtype
    np.testing.assert_array_equal(block, expected[index])


def test_a_stack_reads_only_the_layers_and_rows_asked_for():
    asked = []
    layers = [lazy.LazyTensor((4, 6), ARRAY.dtype, lambda index, i=i: asked.append((i, index)) or ARRAY[index]) for i in range(3)]
    lazy.stack(layers).read((slice(1, 2), slice(0, 2)))
    assert asked == [(1, (slice(0, 2), slice(None)))]


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4)])
def test_memory_is_aligned_so_that_the_cpu_takes_it_over(shape):
    assert lazy.aligned_empty(shape, BF16).ctypes.data % 64 == 0
