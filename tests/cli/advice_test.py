"""Known patterns in the numbers of a run on pairs, and a healthy run that shows none."""

import pytest

from ftjax.cli.advice import PATTERNS, advice

HEALTHY = {"logps/chosen": -90.0, "logps/rejected": -95.0, "rewards/margin": 0.1, "saturated": 0.1, "kl": 0.01}
HEALTHY |= {"length/chosen": 50.0, "length/rejected": 45.0}
LATER = HEALTHY | {"logps/chosen": -89.0, "rewards/margin": 1.0, "kl": 0.1}
ILL = {
    "likelihood displacement": ({"logps/chosen": -120.0}, "-90.0 → -120.0"),
    "saturation": ({"saturated": 0.93}, "93% of the pairs"),
    "no movement": ({"kl": 1e-10, "rewards/margin": 0.0}, "KL 1.0e-10"),
    "length": ({"length/chosen": 90.0}, "90 tokens and rejected ones 45"),
}


def test_a_healthy_run_is_not_advised():
    assert advice(HEALTHY, LATER) == {} and advice({"loss": 1.0}, {"loss": 0.5}) == {}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_named_with_its_numbers(name):
    change, shown = ILL[name]
    found = advice(HEALTHY, LATER | change)
    assert list(found) == [name] and shown in found[name]
