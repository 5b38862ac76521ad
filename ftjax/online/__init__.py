"""Learning from what the policy itself writes: samples, judged and compared, as rows of a batch."""

from ftjax.online.agreement import Disagreement, check_agreement, disagreement, moved
from ftjax.online.estimators import ESTIMATORS, Estimator, Evidence, Worth
from ftjax.online.experience import Experience, filled, informative, minibatch, pairs, shaped, table
from ftjax.online.opponents import contest, duels
from ftjax.online.samples import Sampler, laid, player, rows, sampler, words
from ftjax.online.selection import above, best, kept
from ftjax.online.summary import summary
from ftjax.online.together import rounded, together

__all__ = [
    "ESTIMATORS",
    "Disagreement",
    "Estimator",
    "Evidence",
    "Experience",
    "Sampler",
    "Worth",
    "above",
    "best",
    "check_agreement",
    "contest",
    "disagreement",
    "duels",
    "filled",
    "informative",
    "kept",
    "laid",
    "minibatch",
    "moved",
    "pairs",
    "player",
    "rounded",
    "rows",
    "sampler",
    "shaped",
    "summary",
    "table",
    "together",
    "words",
]
