"""What the options that objectives share may be; asked where a loss begins, and so before anything is compiled."""

from __future__ import annotations


def check_beta(name: str, beta: float) -> None:
    """Refuse the scale of a reward that is not above 0; `name` is the loss that asks.

    Raises:
      ValueError: β ≤ 0.
    """
    if not beta > 0:
        raise ValueError(f"{name}: beta is above 0, not {beta}: at 0 nothing would be learned, and below 0 the reverse.")


def check_weight(name: str, option: str, weight: float) -> None:
    """Refuse a negative weight of a term that may be left out; `name` is the loss that asks.

    Raises:
      ValueError: the weight is below 0.
    """
    if not weight >= 0:
        raise ValueError(f"{name}: {option} is 0 or more, not {weight}: below 0 the reverse of the term would be learned.")
