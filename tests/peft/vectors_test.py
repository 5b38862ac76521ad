"""Task vectors: PEFT's numbers where it has them, and the papers' laws for what is random."""

import pathlib

import numpy as np
import pytest

from ftjax.peft import vectors

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "peft_vectors.npz")  # third_party/peft/merge_golden.py
THREE, FACTORS = list(GOLDEN["vectors"]), GOLDEN["factors"].tolist()


def test_linear_equals_peft():
    np.testing.assert_allclose(vectors.linear(THREE, FACTORS), GOLDEN["linear"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_pruning_and_ties_equal_peft(density):
    pruned = vectors.magnitude_prune(THREE, FACTORS, density=density)
    np.testing.assert_allclose(pruned, GOLDEN[f"magnitude_prune_{density}"], rtol=1e-6, atol=1e-6)
    for sign in vectors.SIGNS:
        merged = vectors.ties(THREE, FACTORS, density=density, sign=sign)
        np.testing.assert_allclose(merged, GOLDEN[f"ties_{density}_{sign}"], rtol=1e-6, atol=1e-6)
    assert not np.array_equal(GOLDEN["ties_0.2_total"], GOLDEN["ties_0.2_frequency"])


def test_dare_keeps_its_share_and_its_mean():
    one = np.full((400, 400), 2.0, np.float32)
    dropped = vectors.dare([one], [1.0], density=0.3, random=np.random.default_rng(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(2.0) / np.float32(0.3)}
    assert abs((dropped > 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / one.size)
    assert abs(dropped.mean() - 2.0) < 0.03


def test_dare_ties_averages_what_agrees():
    random = np.random.default_rng(0)
    merged = vectors.dare_ties([np.float32([1, 1, -1]), np.float32([3, -0.5, -3])], [1.0, 1.0], density=1.0, random=random)
    np.testing.assert_array_equal(merged, np.float32([2, 1, -2]))


@pytest.mark.parametrize("density", [0.0, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ValueError, match="density is in"):
        vectors.ties(THREE, FACTORS, density=density)
