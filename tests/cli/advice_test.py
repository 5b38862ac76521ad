"""Known patterns in the numbers of a run on pairs, labelled responses or rollouts, and healthy runs that show none."""

import inspect
import re

import numpy as np
import pytest

from ftjax import losses
from ftjax.cli.advice import PATTERNS, advice, responses

PAIRS = {"responses": 160, "progress": 0.1, "saturated": 0.1, "rewards/accuracy": 0.6, "length/chosen": 50.0, "length/rejected": 45.0}
PAIRS |= {"logps/chosen": -90.0, "logps/rejected": -95.0, "rewards/chosen": 0.05, "rewards/rejected": -0.05, "rewards/margin": 0.1}
PAIRS |= {"rewards/square": 0.2, "rewards/margin_square": 0.3}
DPO = PAIRS | {"logratio/chosen": 0.5, "logratio/rejected": -0.5, "kl": 0.002}
LABELLED = {"responses": 160, "progress": 0.1, "saturated": 0.1, "accuracy": 0.6, "kl": 0.002, "rewards/square": 0.2}
LABELLED |= {"rewards/desirable": 0.1, "rewards/undesirable": -0.1, "logratio/desirable": 1.0, "logratio/undesirable": -1.0}
LABELLED |= {"length/desirable": 50.0, "length/undesirable": 45.0, "logps/desirable": -90.0, "logps/undesirable": -95.0}
STEPS = {"responses": 160, "progress": 0.1, "accuracy": 0.7, "accuracy/wrong": 0.2, "labels": 0.8}
ROLLOUTS = {"responses": 0, "progress": 0.1, "reward": 0.2, "length": 40.0, "repetition": 0.05, "entropy": 1.0, "kl": 0.01}
ROLLOUTS |= {"zero_variance": 0.3, "finished": 0.9}
LEARNS = {"progress": 0.5, "logps/chosen": -89.0, "rewards/margin": 1.0, "rewards/margin_square": 3.0, "rewards/accuracy": 0.7, "kl": 0.1}
SINGLES = {"progress": 0.5, "kl": 0.1, "rewards/desirable": 0.3, "rewards/undesirable": -0.5}
GRPO = {"progress": 0.5, "kl": 0.1, "reward": 0.6, "length": 55.0, "entropy": 0.5}
RUNS = {"dpo": (DPO, LEARNS), "simpo": (PAIRS, LEARNS), "kto": (LABELLED, SINGLES), "process_reward": (STEPS, {}), "grpo": (ROLLOUTS, GRPO)}
RUNS = {name: (first, first | {key: value for key, value in later.items() if key in first}) for name, (first, later) in RUNS.items()}
GUESS = {"rewards/accuracy": 0.48, "rewards/margin": 0.05, "rewards/margin_square": 0.3}
ILL = [
    ("likelihood displacement", "dpo", {"logratio/chosen": -8.0, "rewards/chosen": -0.8, "rewards/square": 4.0}, "(-8.0 nats"),
    ("falling likelihood", "simpo", {"logps/chosen": -120.0}, "-90.0 → -120.0"),
    ("good responses lost", "kto", {"logratio/desirable": -8.0, "rewards/desirable": -0.8, "rewards/square": 2.0}, "(-8.0 nats"),
    ("saturation", "dpo", {"saturated": 0.93}, "93% of the pairs"),
    ("saturation", "kto", {"saturated": 0.93}, "93% of the responses"),
    ("no movement", "dpo", {"kl": 1e-10, "rewards/margin": 0.0, "rewards/margin_square": 0.0}, "KL 1.0e-10"),
    ("no movement", "kto", {"kl": 0.0021, "rewards/desirable": 0.0, "rewards/undesirable": float("nan")}, "KL 2.1e-03"),
    ("accuracy of one half", "dpo", GUESS, "48% of the pairs are right"),
    ("accuracy of one half", "simpo", GUESS, "48% of the pairs are right"),
    ("no spread", "dpo", {"rewards/margin": 0.0, "rewards/margin_square": 0.0}, "the same margin (0)"),
    ("wrong steps unseen", "process_reward", {"progress": 0.5, "accuracy/wrong": 0.04}, "4% of the wrong steps are found: 80%"),
    ("length", "dpo", {"length/chosen": 90.0}, "90 tokens and rejected ones 45"),
    ("length by label", "kto", {"length/desirable": 90.0}, "90 tokens and undesirable ones 45"),
    ("longer and longer", "grpo", {"length": 61.0}, "0.2 → 0.6), and so do the samples (40 → 61 tokens)"),
    ("repetition", "grpo", {"repetition": 0.4}, "40% of the phrases in a sample were there before (at first 5%)"),
    ("entropy collapse", "grpo", {"entropy": 0.1}, "from 1.000 to 0.100 nats"),
    ("far from the base", "grpo", {"kl": 0.8}, "0.80 nats a token"),
    ("nothing to compare", "grpo", {"zero_variance": 0.95}, "in 95% of the groups"),
    ("cut off", "grpo", {"finished": 0.05}, "5% of the samples end by themselves"),
]


@pytest.mark.parametrize("name", RUNS)
def test_a_healthy_run_is_not_advised(name):
    assert advice(*RUNS[name], algorithm=name) == {}


def test_every_pattern_has_an_example_and_every_remedy_an_algorithm():
    assert {name for name, *_ in ILL} == set(PATTERNS)
    named = [
        name for pattern in PATTERNS.values() for names in (*(names for names, _ in pattern.remedies), pattern.unless) for name in names
    ]
    assert set(named) <= set(losses.LOSSES)


@pytest.mark.parametrize(("name", "algorithm", "change", "shown"), ILL)
def test_a_pattern_is_named_with_its_numbers(name, algorithm, change, shown):
    first, later = RUNS[algorithm]
    found = advice(first, later | change, algorithm=algorithm)
    assert list(found) == [name] and shown in found[name]


def reading(rng, *, moved, progress, pairs=160, beta=0.1, tokens=100):
    """Metrics of pairs whose log-ratios are `moved` (chosen, rejected) with a spread, and where both passes round as bfloat16 does."""
    noise = rng.normal(0, 0.05, (pairs, 2, tokens))  # a nat in a response of 400 tokens
    logratios = noise.sum(-1) + np.asarray(moved) * rng.lognormal(0, 1, (pairs, 1))
    logps = rng.normal(-1, 0.4, (pairs, 2)) * tokens + logratios
    rewards, margin = beta * logratios, beta * (logratios[:, 0] - logratios[:, 1])
    kl = np.mean((noise + (logratios - noise.sum(-1))[..., None] / tokens) ** 2) / 2
    found = {
        "rewards/margin": margin.mean(),
        "rewards/margin_square": np.square(margin).mean(),
        "rewards/square": np.square(rewards).mean(),
    }
    found |= {"rewards/accuracy": np.mean(margin > 0), "kl": kl, "saturated": np.mean(np.abs(margin) > 4.6)}
    for n, side in enumerate(("chosen", "rejected")):
        found |= {f"rewards/{side}": rewards[:, n].mean(), f"logratio/{side}": logratios[:, n].mean()}
        found |= {f"logps/{side}": logps[:, n].mean(), f"length/{side}": float(tokens)}
    return found | {"responses": pairs, "progress": progress}


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ((0.0, 0.0), {"no movement"}),
        ((2.0, -2.0), set()),
        ((-1.0, -3.0), set()),
        ((-10.0, -20.0), {"likelihood displacement"}),
        ((20.0, 20.0), {"accuracy of one half"}),
    ],
)
def test_what_is_said_does_not_hang_on_rounding_and_on_which_pairs_came(moved, expected):
    """Thirty readings of 160 pairs: what a pattern says is said in a third of them, and what none says in not one."""
    rng = np.random.default_rng(0)
    first = reading(rng, moved=(0.0, 0.0), progress=0.02)
    said = [set(advice(first, reading(rng, moved=moved, progress=0.5), algorithm="dpo")) for _ in range(30)]
    assert set().union(*said) == expected and sum(found == expected for found in said) >= 10


def test_chosen_responses_of_other_batches_are_not_called_less_likely():
    """Without a reference: log-probabilities of 100 tokens that differ by 40 nats from one response to the next."""
    rng = np.random.default_rng(1)
    known = ("logratio/chosen", "logratio/rejected", "kl")
    readings = [reading(rng, moved=(0.1, -0.1), progress=0.5) for _ in range(40)]
    first, *later = [{name: value for name, value in found.items() if name not in known} for found in readings]
    assert all("falling likelihood" not in advice(first, now, algorithm="simpo") for now in later)
    assert max(abs(now["logps/chosen"] - first["logps/chosen"]) for now in later) > 5


def test_a_policy_that_has_hardly_begun_is_given_time():
    first, later = RUNS["dpo"]
    early = later | {"progress": 0.2}
    assert advice(first, early | GUESS, algorithm="dpo") == advice(first, early | {"kl": 0.0, "rewards/margin": 0.0}, algorithm="dpo") == {}


REMEDIES = [(name, *remedy) for name, pattern in PATTERNS.items() for remedy in pattern.remedies]


@pytest.mark.parametrize(("pattern", "algorithms", "text"), REMEDIES)
def test_no_run_is_told_to_take_what_it_has_or_an_option_that_its_loss_does_not_take(pattern, algorithms, text):
    for algorithm in set(algorithms) - set(PATTERNS[pattern].unless):
        assert algorithm not in re.findall(r"\w+", text)
        assert set(re.findall(r"loss\.(\w+)", text)) <= set(inspect.signature(losses.LOSSES[algorithm]).parameters)


@pytest.mark.parametrize("name", ["ipo", "sppo_hard", "robust"])
def test_a_loss_whose_gradient_stays_is_not_said_to_be_saturated(name):
    assert advice(DPO, DPO | {"saturated": 0.9}, algorithm=name) == {}


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "alphapo", "orpo", "tpo_l"])
def test_a_loss_per_token_does_not_learn_length_from_a_sum(name):
    assert advice(PAIRS, PAIRS | {"length/chosen": 90.0}, algorithm=name) == {}


def test_what_helps_hangs_on_the_algorithm():
    shorter = DPO | LEARNS | {"length/chosen": 90.0}
    assert "loss.tail_weight" in advice(DPO, shorter, algorithm="dpo")["length"]
    assert (
        "simpo" in advice(PAIRS, shorter, algorithm="cpo")["length"]
        and "tail_weight" not in advice(PAIRS, shorter, algorithm="cpo")["length"]
    )
    displaced = DPO | LEARNS | {"logratio/chosen": -8.0, "rewards/chosen": -0.8}
    assert "algorithm rpo" in advice(DPO, displaced, algorithm="dpo")["likelihood displacement"]
    assert "A larger loss.nll_coef or" in advice(DPO, displaced, algorithm="rpo")["likelihood displacement"]
    assert "likelihood displacement" not in advice(DPO, displaced, algorithm="apo_down")


def test_sums_say_of_how_many_responses_they_are():
    assert responses({"saturated": [3.0, 40.0]}) == 40 and responses({"accuracy/wrong": [1.0, 9.0], "accuracy": [3.0, 40.0]}) == 9
    assert responses({"loss": [1.0, 5.0]}) is None
