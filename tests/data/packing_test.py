import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.packing import PACKINGS, best_fit, make_plan, split, widths

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SETTINGS = {"batch_size": 3, "max_tokens": 16, "buckets": 3}


def plan_of(lengths, packing, **options):
    return make_plan(np.asarray(lengths), packing=packing, generator=np.random.default_rng(0), **SETTINGS | options)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_no_row_overflows_and_no_token_is_lost_or_doubled(packing, lengths):
    plan = plan_of(lengths, packing)
    seen = [np.zeros(length, int) for length in lengths]
    rows = plan.batches[plan.batches >= 0]
    assert sorted(rows) == list(range(len(plan.rows.starts) - 1))
    for batch, width in zip(plan.batches, plan.widths, strict=True):
        for row in batch[batch >= 0]:
            pieces = plan.rows.pieces[plan.rows.starts[row] : plan.rows.starts[row + 1]]
            assert 1 <= (pieces[:, 2] - pieces[:, 1]).sum() <= width <= 16
            for sequence, begin, end in pieces:
                seen[sequence][begin:end] += 1
    assert all((count == 1).all() for count in seen)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_number_of_batches_does_not_depend_on_the_order(packing):
    lengths = np.random.default_rng(1).integers(1, 40, 200)
    steps = {len(plan_of(np.random.default_rng(seed).permutation(lengths), packing).batches) for seed in range(5)}
    assert len(steps) == 1


def test_best_fit_by_hand():
    """5, 4, 3, 2, 2 in rows of 8: 5 opens a row, 4 a second; 3 fits the first exactly, 2 and 2 the second."""
    members, starts = best_fit(np.array([2, 5, 3, 2, 4]), 8)
    assert [sorted(row.tolist()) for row in np.split(members, starts[1:-1])] == [[1, 2], [0, 3, 4]]


def test_best_fit_is_near_the_optimum_and_fast():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 0.8, 100_000).astype(int) + 1, 2048)
    begin = time.monotonic()
    _, starts = best_fit(lengths, 2048)
    assert time.monotonic() - begin < 10
    assert lengths.sum() / ((len(starts) - 1) * 2048) > 0.995


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="do not fit rows of 8"):
        best_fit(np.array([9]), 8)
    with pytest.raises(ValueError, match="packing is 'bestfit'; nearest: 'best_fit'"):
        plan_of([1], "bestfit")


def test_padding_puts_like_lengths_together_in_few_widths():
    lengths = np.random.default_rng(0).integers(1, 17, 100)
    plan = plan_of(lengths, "none")
    assert set(plan.widths) <= {8, 16} == set(widths(16, 3))
    short = plan.batches[plan.widths == 8]
    assert (lengths[short] <= 8).all() and short.size >= (lengths <= 8).sum() - 2
    assert (plan.batches < 0).sum() == -len(lengths) % 3


def test_wrapped_rows_are_full_but_the_last():
    plan = plan_of([10, 30, 3], "wrapped", shuffle=False)
    assert plan.rows.pieces.tolist() == [[0, 0, 10], [1, 0, 6], [1, 6, 22], [1, 22, 30], [2, 0, 3]]
    assert plan.rows.starts.tolist() == [0, 2, 3, 5]


def test_long_documents_are_split():
    assert split(np.array([3, 9, 8]), 4).tolist() == [[0, 0, 3], [1, 0, 4], [1, 4, 8], [1, 8, 9], [2, 0, 4], [2, 4, 8]]
