"""What the numbers of a run on pairs or rollouts mean, in plain words, when a known pattern appears for the first time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Values = Mapping[str, float]


class Pattern(NamedTuple):
    """A pattern in the metrics of `ftjax.losses.diagnosis` and of `ftjax.online.summary`."""

    needs: tuple[str, ...]
    """The metrics that it reads; where one is missing it is not looked for."""
    seen: Callable[[Values, Values], bool]
    """`(first report, this report) -> bool`."""
    text: str
    """What is said, with `{metric}` for values of this report and `{first[metric]}` for those of the first."""


PATTERNS: Mapping[str, Pattern] = {
    "likelihood displacement": Pattern(
        ("logps/chosen", "logps/rejected", "rewards/margin"),
        lambda first, now: now["logps/chosen"] < first["logps/chosen"] - 5 and now["rewards/margin"] > first["rewards/margin"],
        "the margin grows, but chosen responses become less likely too ({first[logps/chosen]:.1f} → {logps/chosen:.1f}): what gains is "
        "something else. Common where the two responses are alike; an NLL term (algorithm rpo, or loss.nll_coef) or a larger loss.beta "
        "holds the chosen ones.",
    ),
    "saturation": Pattern(
        ("saturated",),
        lambda first, now: now["saturated"] > 0.8,
        "{saturated:.0%} of the pairs have so large a margin that they teach nothing more. Stop earlier, or take harder pairs; ipo and "
        "label smoothing do not saturate.",
    ),
    "no movement": Pattern(
        ("kl", "rewards/margin"),
        lambda first, now: now["kl"] < 1e-9 and abs(now["rewards/margin"]) < 1e-5,
        "the policy is still its reference (KL {kl:.1e}), so the loss stays where it began: the learning rate is too low, or nothing that "
        "matters is trained.",
    ),
    "length": Pattern(
        ("length/chosen", "length/rejected"),
        lambda first, now: not 2 / 3 < now["length/chosen"] / max(now["length/rejected"], 1e-9) < 3 / 2,
        "chosen responses have {length/chosen:.0f} tokens and rejected ones {length/rejected:.0f}: a sum over tokens learns length from "
        "that. sigmoid_norm and simpo average over tokens, loss.tail_weight leaves out what is longer.",
    ),
    "longer and longer": Pattern(
        ("reward", "length"),
        lambda first, now: now["length"] > 1.5 * first["length"] and now["reward"] > first["reward"],
        "the reward grows ({first[reward]:.3g} → {reward:.3g}), and so do the samples ({first[length]:.0f} → {length:.0f} tokens): look in "
        "rollouts.jsonl whether length is what is rewarded. The reward soft_overlong takes from long ones, dr_grpo does not favour them.",
    ),
    "repetition": Pattern(
        ("reward", "repetition"),
        lambda first, now: now["repetition"] > 0.25 and now["repetition"] > 2 * first["repetition"],
        "{repetition:.0%} of the phrases in a sample were there before (at first {first[repetition]:.0%}): the reward is hacked or the "
        "policy breaks down; see rollouts.jsonl. The reward repetition takes from it; so does staying near the base (loss.kl_coef).",
    ),
    "entropy collapse": Pattern(
        ("reward", "entropy"),
        lambda first, now: now["entropy"] < 0.2 * first["entropy"],
        "the entropy fell from {first[entropy]:.3f} to {entropy:.3f} nats a token: the samples of a prompt are nearly one, and nothing new "
        "is found. A larger loss.clip_high (dapo), loss.kl_coef or a lower learning rate keeps it up.",
    ),
    "far from the base": Pattern(
        ("reward", "kl"),
        lambda first, now: now["kl"] > 0.5,
        "the policy is {kl:.2f} nats a token from the base: much of what that knew is being given up. A larger loss.kl_coef or "
        "rollout.kl_penalty, or a lower learning rate, holds it.",
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


def advice(first: Values, now: Values) -> dict[str, str]:
    """Return `{pattern: what it means}` for all patterns that a report shows, against the first of the run."""
    known = {name: pattern for name, pattern in PATTERNS.items() if all(metric in now and metric in first for metric in pattern.needs)}
    shown = {**now, "first": first}
    return {name: pattern.text.format_map(shown) for name, pattern in known.items() if pattern.seen(first, now)}
