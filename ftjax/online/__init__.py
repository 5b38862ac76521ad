"""Learning from what the policy itself writes: samples, judged and compared, as rows of a batch."""

from ftjax.online.agreement import Disagreement, check_agreement, disagreement
from ftjax.online.estimators import ESTIMATORS, Evidence
from ftjax.online.experience import Experience, minibatch, table
from ftjax.online.samples import Sample, Sampler, rows, static_sampler
from ftjax.online.summary import summary

__all__ = [
    "ESTIMATORS",
    "Disagreement",
    "Evidence",
    "Experience",
    "Sample",
    "Sampler",
    "check_agreement",
    "disagreement",
    "minibatch",
    "rows",
    "static_sampler",
    "summary",
    "table",
]
