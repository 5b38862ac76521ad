import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.mixture import PERIOD, Mixture, permute


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 5))
def test_each_epoch_is_a_permutation(size, seed, epoch):
    order = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(size))


def test_a_permutation_is_found_index_by_index():
    whole = permute(np.arange(1000), 1000, seed=3)
    assert [int(permute(np.array([i]), 1000, seed=3)[0]) for i in (0, 999, 17)] == whole[[0, 999, 17]].tolist()


def test_permutations_differ_by_seed_epoch_and_stream_and_look_random():
    orders = [permute(np.arange(4096), 4096, seed=s, epoch=e, stream=t) for s, e, t in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    for at, one in enumerate(orders):
        for other in [np.arange(4096), *orders[:at]]:
            assert (one == other).sum() < 12  # 1 on average
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


def test_permutations_of_three_are_all_as_likely():
    orders = np.stack([permute(np.arange(3), 3, seed=seed) for seed in range(3000)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6 and (abs(counts - 500) < 120).all()


def test_without_weights_every_row_comes_once_an_epoch():
    mixture = Mixture((5, 1, 7), None, seed=1)
    for epoch in range(3):
        source, row = mixture.draw(np.arange(13) + epoch * 13)
        assert sorted(zip(source, row, strict=True)) == [(s, r) for s, size in enumerate((5, 1, 7)) for r in range(size)]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 2.0, 3.0, 5.0), (0.999, 0.001)])
def test_any_long_window_holds_each_source_in_its_proportion(weights):
    mixture = Mixture(tuple(100 + 7 * s for s in range(len(weights))), weights, seed=0)
    source, _ = mixture.draw(np.arange(3 * PERIOD))
    for s, weight in enumerate(weights):
        drawn = np.concatenate([[0], np.cumsum(source == s)])
        share = weight / sum(weights)
        for size in (100, 1234, PERIOD):
            windows = drawn[size:] - drawn[:-size]
            assert abs(windows - size * share).max() <= 2, (s, size)


def test_with_weights_a_source_is_reshuffled_each_time_it_is_through():
    mixture = Mixture((7, 1000), (0.5, 0.5), seed=0)
    source, row = mixture.draw(np.arange(2 * PERIOD + 14))
    small = row[source == 0]
    epochs = small[: len(small) // 7 * 7].reshape(-1, 7)
    assert len(epochs) == (PERIOD + 7) // 7 and (np.sort(epochs) == np.arange(7)).all()
    assert len(np.unique(epochs, axis=0)) > 1000


def test_a_draw_is_the_same_alone_and_among_others():
    for weights in (None, (3.0, 1.0)):
        mixture = Mixture((50, 60), weights, seed=5)
        source, row = mixture.draw(np.arange(25_000))
        for index in (0, 109, 110, 24_999):
            assert (mixture.source_of(index), mixture.row_of(index)) == (source[index], row[index])


def test_bad_mixtures_are_errors():
    with pytest.raises(ValueError, match="at least one row"):
        Mixture((3, 0), None, 0)
    with pytest.raises(ValueError, match="as many positive weights"):
        Mixture((3, 3), (1.0,), 0)
    with pytest.raises(ValueError, match="never be drawn"):
        Mixture((3, 3), (1.0, 1e-6), 0)
