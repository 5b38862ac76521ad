"""What the numbers of a run on pairs, labelled responses or rollouts mean, in plain words, when a known pattern appears for the first time.

A mean of a few pairs says little: in bfloat16 alone the log-probability of a response moves by up to a nat. So pairs and labelled responses
are read `ENOUGH` at a time, and where a pattern hangs on their log-probabilities, rewards, margins or accuracy it takes `STANDARD_ERRORS`
of what is read. Shares of saturated pairs and of wrong steps, lengths, and all that is said of rollouts have plain bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from ftjax import losses

Values = Mapping[str, float]
ENOUGH = 128
"""Pairs, labelled responses or wrong steps that are read together; what learns from samples without pairing them, at each report."""
STANDARD_ERRORS = 3
LATE = 0.25
"""The part of a run after which it should have begun to learn."""
NOISE = 0.01
"""The distance `kl` from the reference, in nats a token, that two bfloat16 passes over the same weights stay below."""


class Pattern(NamedTuple):
    """A pattern in the metrics of `ftjax.losses` and of `ftjax.online.summary`."""

    needs: tuple[str, ...]
    """The metrics that it reads; where one is missing it is not looked for."""
    seen: Callable[[Values, Values], bool]
    """`(first reading, this reading) -> bool`."""
    text: str
    """What is said, with `{metric}` for values of this reading and `{first[metric]}` for those of the first."""
    remedies: tuple[tuple[Collection[str], str], ...] = ()
    """`(algorithms, what helps there)`; an algorithm has them all that name it."""
    unless: Collection[str] = ()
    """Algorithms in which it means nothing."""


PAIRED = frozenset(name for name, needs in losses.NEEDS.items() if needs.data == "pairs" and needs.outputs != ("logps", "values"))
ANCHORED = frozenset(name for name in PAIRED if losses.NEEDS[name].reference)
LABELLED = frozenset(name for name, needs in losses.NEEDS.items() if needs.data == "labelled")
PER_TOKEN = frozenset({"ipo", "sigmoid_norm", "simpo", "alphapo", "orpo", "tpo_l"})
"""Objectives that compare log-probabilities per token, so that length by itself is not rewarded."""
WITH_NLL = frozenset({"rpo", "mpo", "cpo", "simpo", "alphapo", "tpo", "tpo_l"})
UNBOUNDED = frozenset({"ipo", "ipo_sum", "sppo_hard", "robust"})
"""Objectives whose gradient does not go to 0 as a margin grows."""


def _less_likely(side: str) -> Callable[[Values, Values], bool]:
    """Return whether responses of a side lose against the reference: two nats on average, and more than their spread explains."""

    def seen(first: Values, now: Values) -> bool:
        error = math.sqrt(now["rewards/square"] / now["responses"])
        return now[f"logratio/{side}"] < -2 and now[f"rewards/{side}"] < -STANDARD_ERRORS * error

    return seen


def _fall(first: Values, now: Values) -> bool:
    """Return whether chosen responses became less likely per token than the first ones were; from one to the next that varies by a nat."""
    per_token = [values["logps/chosen"] / values["length/chosen"] for values in (first, now)]
    error = math.sqrt(1 / first["responses"] + 1 / now["responses"])
    return per_token[1] < per_token[0] - STANDARD_ERRORS * error and now["rewards/margin"] > first["rewards/margin"]


def _gap(values: Values) -> tuple[float, float]:
    """Return by how much chosen responses are worth more than rejected ones, or desirable than undesirable ones, and the standard error."""
    if "rewards/margin" in values:
        variance = max(values["rewards/margin_square"] - values["rewards/margin"] ** 2, 0)
        return values["rewards/margin"], math.sqrt(variance / values["responses"])
    sides = (values["rewards/desirable"], -values["rewards/undesirable"])
    known = [value for value in sides if not math.isnan(value)]  # NaN: there is none of the kind
    return sum(known), math.sqrt(4 * values["rewards/square"] / values["responses"])


def _at_reference(first: Values, now: Values) -> bool:
    """Return whether the distance from the reference is no more than rounding, and does not grow."""
    return now["kl"] < NOISE and now["kl"] <= 1.5 * first["kl"]


def _stays(first: Values, now: Values) -> bool:
    gap, error = _gap(now)
    return now["progress"] >= LATE and _at_reference(first, now) and abs(gap) <= STANDARD_ERRORS * error


def _guesses(first: Values, now: Values) -> bool:
    """Return whether, beyond chance, less than 60 % of the pairs are right, though the policy has moved, or the margin has not grown."""
    if now["progress"] < LATE or now["rewards/accuracy"] + STANDARD_ERRORS * math.sqrt(0.25 / now["responses"]) >= 0.6:
        return False
    if "kl" in now:
        return not _at_reference(first, now)
    (before, past), (margin, error) = _gap(first), _gap(now)
    return margin - before <= STANDARD_ERRORS * math.hypot(past, error)


def _all_alike(first: Values, now: Values) -> bool:
    """Return whether margins differ by less than a thousandth of the rewards' size; at the reference that is no news."""
    variance = now["rewards/margin_square"] - now["rewards/margin"] ** 2
    return variance <= 1e-6 * now["rewards/square"] and not ("kl" in now and _at_reference(first, now))


_CLIPPED = frozenset(losses.POLICY_LOSSES) | {"ppo"}
_HOLD = (
    (_CLIPPED, "A larger loss.kl_coef or rollout.kl_penalty, or a lower learning rate, holds it."),
    (ANCHORED | {"nash_md"}, "A larger loss.beta or a lower learning rate holds it."),
    (("rejection_sampling",), "A lower learning rate holds it."),
)
PATTERNS: Mapping[str, Pattern] = {
    "likelihood displacement": Pattern(
        ("logratio/chosen", "rewards/chosen", "rewards/square", "rewards/margin"),
        lambda first, now: _less_likely("chosen")(first, now) and now["rewards/margin"] > 0,
        "the margin grows, but chosen responses become less likely too ({logratio/chosen:+.1f} nats against the reference): what gains "
        "is something else. Common where the two responses are alike.",
        (
            (ANCHORED - WITH_NLL, "An NLL term (algorithm rpo) or a larger loss.beta holds the chosen ones."),
            (ANCHORED & WITH_NLL, "A larger loss.nll_coef or loss.beta holds the chosen ones."),
        ),
        unless=("apo_down",),  # which is to lower both
    ),
    "falling likelihood": Pattern(
        ("logps/chosen", "length/chosen", "rewards/margin"),
        lambda first, now: "logratio/chosen" not in now and _fall(first, now),
        "the margin grows, but chosen responses become less likely too ({first[logps/chosen]:.1f} → {logps/chosen:.1f}): what gains is "
        "something else. Common where the two responses are alike.",
        (
            (WITH_NLL, "A larger loss.nll_coef holds the chosen ones."),
            (("orpo",), "A smaller loss.beta gives the NLL more weight."),
        ),
    ),
    "good responses lost": Pattern(
        ("logratio/desirable", "rewards/desirable", "rewards/square"),
        _less_likely("desirable"),
        "desirable responses, or those to keep, become less likely ({logratio/desirable:+.1f} nats against the reference).",
        (
            (("kto",), "A larger loss.desirable_weight or loss.beta holds them."),
            (("apo_zero_unpaired", "bco", "bco_balanced"), "A larger loss.beta or a lower learning rate holds them."),
            (("npo",), "A larger loss.retain_coef holds them."),
        ),
    ),
    "saturation": Pattern(
        ("saturated",),
        lambda first, now: now["saturated"] > 0.8,
        "{saturated:.0%} of the {judged} are so far from even that they teach nothing more. Stop earlier, or take harder ones.",
        ((ANCHORED, "ipo does not saturate."), (("cpo", "simpo", "alphapo"), "loss.label_smoothing holds the margin back.")),
        unless=UNBOUNDED,
    ),
    "no movement": Pattern(
        ("kl", "rewards/square"),
        _stays,
        "the policy is still its reference but for rounding (KL {kl:.1e} nats a token), so the loss stays where it began: the learning "
        "rate is too low, or nothing that matters is trained.",
    ),
    "accuracy of one half": Pattern(
        ("rewards/accuracy", "rewards/margin", "rewards/margin_square"),
        _guesses,
        "{rewards/accuracy:.0%} of the pairs are right, hardly more than by guessing (margin at first {first[rewards/margin]:.2g}, now "
        "{rewards/margin:.2g}): look with `ftjax inspect` whether labels are exchanged or the two responses are alike; else try another "
        "learning rate.",
    ),
    "no spread": Pattern(
        ("rewards/margin", "rewards/margin_square", "rewards/square"),
        _all_alike,
        "all pairs have the same margin ({rewards/margin:.2g}): the two responses of each are the same, or the model tells none apart. "
        "Look at the pairs with `ftjax inspect`; of a reward model the value head has to be trained.",
    ),
    "wrong steps unseen": Pattern(
        ("accuracy/wrong", "labels"),
        lambda first, now: now["progress"] >= LATE and now["accuracy/wrong"] < 0.1,
        "{accuracy/wrong:.0%} of the wrong steps are found: {labels:.0%} of all are right, and to call each of them right is cheap. Train "
        "longer, or take more solutions with wrong steps.",
    ),
    "length": Pattern(
        ("length/chosen", "length/rejected"),
        lambda first, now: not 2 / 3 < now["length/chosen"] / max(now["length/rejected"], 1e-9) < 3 / 2,
        "chosen responses have {length/chosen:.0f} tokens and rejected ones {length/rejected:.0f}: a sum over tokens learns length from "
        "that.",
        (
            (ANCHORED, "sigmoid_norm and ipo average over tokens."),
            (ANCHORED - {"xpo"}, "loss.tail_weight leaves out what is longer."),
            (("cpo",), "simpo averages over tokens."),
            (("tpo",), "tpo_l averages over tokens."),
        ),
        unless=PER_TOKEN,
    ),
    "length by label": Pattern(
        ("length/desirable", "length/undesirable"),
        lambda first, now: not 2 / 3 < now["length/desirable"] / max(now["length/undesirable"], 1e-9) < 3 / 2,
        "desirable responses have {length/desirable:.0f} tokens and undesirable ones {length/undesirable:.0f}: a sum over tokens learns "
        "length from that. Take responses of like lengths.",
        unless=("npo",),  # what is to be forgotten is no worse answer to the same prompts
    ),
    "longer and longer": Pattern(
        ("reward", "length"),
        lambda first, now: now["length"] > 1.5 * first["length"] and now["reward"] > first["reward"],
        "the reward grows ({first[reward]:.3g} → {reward:.3g}), and so do the samples ({first[length]:.0f} → {length:.0f} tokens): look in "
        "rollouts.jsonl whether length is what is rewarded. The reward soft_overlong takes from long ones.",
        ((_CLIPPED - {"dr_grpo"}, "dr_grpo does not favour them."),),
    ),
    "repetition": Pattern(
        ("reward", "repetition"),
        lambda first, now: now["repetition"] > 0.25 and now["repetition"] > 2 * first["repetition"],
        "{repetition:.0%} of the phrases in a sample were there before (at first {first[repetition]:.0%}): the reward is hacked or the "
        "policy breaks down; see rollouts.jsonl. The reward repetition takes from it; so does staying near the base.",
        _HOLD,
    ),
    "entropy collapse": Pattern(
        ("reward", "entropy"),
        lambda first, now: now["entropy"] < 0.2 * first["entropy"],
        "the entropy fell from {first[entropy]:.3f} to {entropy:.3f} nats a token: the samples of a prompt are nearly one, and nothing new "
        "is found.",
        ((_CLIPPED, "A larger loss.clip_high keeps it up."), *_HOLD),
    ),
    "far from the base": Pattern(
        ("reward", "kl"),
        lambda first, now: now["kl"] > 0.5,
        "the policy is {kl:.2f} nats a token from the base: much of what that knew is being given up.",
        _HOLD,
    ),
    "nothing to compare": Pattern(
        ("reward", "zero_variance"),
        lambda first, now: now["zero_variance"] > 0.9,
        "in {zero_variance:.0%} of the groups all samples are worth the same, and teach nothing: the prompts are too hard or too easy "
        "(reward {reward:.3g}). Take others, more rollout.samples_per_prompt, or a reward that says more.",
    ),
    "cut off": Pattern(
        ("reward", "finished"),
        lambda first, now: now["finished"] < 0.1,
        "{finished:.0%} of the samples end by themselves; the others were cut at rollout.max_tokens ({length:.0f} tokens on average), and "
        "their reward says little of how they would have ended.",
    ),
}
"""By what the pattern is called."""


def responses(sums: Mapping[str, Sequence[float]]) -> float | None:
    """Return of how many pairs, labelled responses or wrong steps sums `{metric: (total, weight)}` speak; None for other objectives."""
    return next((sums[name][1] for name in ("saturated", "accuracy/wrong") if name in sums), None)


def advice(first: Values, now: Values, *, algorithm: str) -> dict[str, str]:
    """Return `{pattern: what it means and what helps}` for all patterns that a reading shows.

    Args:
      first: the first reading of the run: its metrics, and `responses`, how many pairs or responses they are means of.
      now: this one, and `progress`: the part of the run that is done, in [0, 1].
      algorithm: a name in `losses.LOSSES`.
    """
    shown = {"judged": "pairs" if "rewards/margin" in now else "responses", **now, "first": first}
    found = {}
    for name, pattern in PATTERNS.items():
        known = all(metric in values for metric in pattern.needs for values in (first, now))
        if known and algorithm not in pattern.unless and pattern.seen(first, now):
            remedies = [text for algorithms, text in pattern.remedies if algorithm in algorithms]
            found[name] = " ".join([pattern.text.format_map(shown), *remedies])
    return found
