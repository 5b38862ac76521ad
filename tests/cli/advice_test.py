"""Known patterns in the numbers of a run on pairs or rollouts, and a healthy run that shows none."""

import pytest

from ftjax.cli.advice import PATTERNS, advice

HEALTHY = {"logps/chosen": -90.0, "logps/rejected": -95.0, "rewards/margin": 0.1, "saturated": 0.1, "kl": 0.01}
HEALTHY |= {"length/chosen": 50.0, "length/rejected": 45.0}
HEALTHY |= {"reward": 0.2, "length": 40.0, "repetition": 0.05, "entropy": 1.0, "zero_variance": 0.3, "finished": 0.9}
LATER = HEALTHY | {"logps/chosen": -89.0, "rewards/margin": 1.0, "kl": 0.1, "reward": 0.6, "length": 55.0, "entropy": 0.5}
ILL = {
    "likelihood displacement": ({"logps/chosen": -120.0}, "-90.0 → -120.0"),
    "saturation": ({"saturated": 0.93}, "93% of the pairs"),
    "no movement": ({"kl": 1e-10, "rewards/margin": 0.0}, "KL 1.0e-10"),
    "length": ({"length/chosen": 90.0}, "90 tokens and rejected ones 45"),
    "longer and longer": ({"length": 61.0}, "0.2 → 0.6), and so do the samples (40 → 61 tokens)"),
    "repetition": ({"repetition": 0.4}, "40% of the phrases in a sample were there before (at first 5%)"),
    "entropy collapse": ({"entropy": 0.1}, "from 1.000 to 0.100 nats"),
    "far from the base": ({"kl": 0.8}, "0.80 nats a token"),
    "nothing to compare": ({"zero_variance": 0.95}, "in 95% of the groups"),
    "cut off": ({"finished": 0.05}, "5% of the samples end by themselves"),
}


def test_a_healthy_run_is_not_advised():
    assert advice(HEALTHY, LATER) == {} and advice({"loss": 1.0}, {"loss": 0.5}) == {}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_named_with_its_numbers(name):
    change, shown = ILL[name]
    found = advice(HEALTHY, LATER | change)
    assert list(found) == [name] and shown in found[name]
