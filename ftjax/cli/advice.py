"""What the numbers of a run on pairs mean, in plain words, when a known pattern appears for the first time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Values = Mapping[str, float]


class Pattern(NamedTuple):
    """A pattern in the metrics of `ftjax.losses.diagnosis`."""

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
}
"""By what the pattern is called."""


def advice(first: Values, now: Values) -> dict[str, str]:
    """Return `{pattern: what it means}` for all patterns that a report shows, against the first of the run."""
    known = {name: pattern for name, pattern in PATTERNS.items() if all(metric in now and metric in first for metric in pattern.needs)}
    shown = {**now, "first": first}
    return {name: pattern.text.format_map(shown) for name, pattern in known.items() if pattern.seen(first, now)}
