"""What each objective of `LOSSES` asks for: which data, which scores, and what is written into a batch before its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ftjax.losses.pairs import PAIR_LOSSES
from ftjax.losses.policy_gradient import POLICY_LOSSES


class Needs(NamedTuple):
    """Of one objective."""

    data: str = "pairs"
    """"messages": conversations, `[b, t]`; "pairs": a chosen and a rejected response, `[b, 2, t]`; "labelled": single responses with
    `desirable`, `[b, t]`; "triples": a pair and the best known response, `[b, 3, t]`; "steps": solutions with `labels` where `loss_mask`
    is 1, `[b, t]`; "rollouts": the policy's own responses, `[b, t]`, with `fields`."""
    outputs: tuple[str, ...] = ("logps",)
    """Of `scoring.score`, without which the objective cannot be computed; with "divergence" of `scoring.score_against`."""
    reference: bool = False
    """Whether it reads `reference_logps`."""
    baseline: bool = False
    """Whether it reads `baseline`, a mean over the `mismatched` rows of the whole step."""
    running: tuple[str, ...] = ()
    """The metrics whose means over all steps before, averaged, it reads as `baseline`."""
    share: bool = False
    """Whether it reads `desirable_share`, of the whole step."""
    fields: tuple[str, ...] = ()
    """Of `Batch`, which what judges rollouts writes: "desirable" is `[b]`, "advantages" may be, all others are `[b, t]`."""
    opponent: str = ""
    """Whose sample each of the policy's is compared with: "reference", or "mixture" of that and the policy; "" for nobody's."""
    selected: bool = False
    """Whether it learns from those of the policy's samples that their rewards select."""
    whole_batch: bool = False
    """Whether it compares the rows of a batch with each other, so that micro-batches say something else than the whole."""
    both_classes: bool = False
    """Of "labelled" data: whether it needs desirable responses and undesirable ones, and says nothing of one class alone."""


_ANCHORED = Needs(reference=True)
NEEDS: Mapping[str, Needs] = {
    "sft": Needs("messages"),
    **dict.fromkeys(("dpo", "rpo", "mpo", *(name for name in PAIR_LOSSES if name != "sigmoid")), _ANCHORED),
    **dict.fromkeys(("aot", "aot_unpaired"), Needs(reference=True, whole_batch=True)),
    "wpo": Needs(outputs=("logps", "log_collision"), reference=True),
    **dict.fromkeys(("orpo", "cpo", "simpo", "alphapo"), Needs()),
    **dict.fromkeys(("tpo", "tpo_l"), Needs("triples")),
    "kto": Needs("labelled", reference=True, baseline=True, both_classes=True),
    "apo_zero_unpaired": Needs("labelled", reference=True, both_classes=True),
    "bco": Needs("labelled", reference=True, running=("rewards",), both_classes=True),
    "bco_balanced": Needs("labelled", reference=True, running=("rewards/desirable", "rewards/undesirable"), both_classes=True),
    "reward": Needs(outputs=("logps", "values")),
    "process_reward": Needs("steps", outputs=("logps", "values")),
    "distill": Needs("messages", outputs=("logps", "divergence")),
    **dict.fromkeys(POLICY_LOSSES, Needs("rollouts", fields=("advantages",))),
    "ppo": Needs("rollouts", outputs=("logps", "values"), fields=("advantages", "returns")),
    "nash_md": Needs("rollouts", reference=True, fields=("advantages",), opponent="mixture"),
    "xpo": Needs(reference=True, fields=("desirable",), opponent="reference"),
    "rejection_sampling": Needs("messages", selected=True),
    "npo": Needs("labelled", reference=True, share=True),
    "gradient_difference": Needs("labelled", share=True),
}
"""By the names of `LOSSES`."""
