"""Generation: the same weights that train, adapter unmerged, sampled by the same program that scores them."""

from ftjax.rollout.engine import Engine
from ftjax.rollout.generate import Completion, Decoding, extend, generate, start
from ftjax.rollout.prompts import Encoder, Prompt, bucket, pad
from ftjax.rollout.requests import Request, Sample
from ftjax.rollout.sampling import Draw, Sampling, Seen, sample, settings
from ftjax.rollout.text import generate_text, stream_text

__all__ = [
    "Completion",
    "Decoding",
    "Draw",
    "Encoder",
    "Engine",
    "Prompt",
    "Request",
    "Sample",
    "Sampling",
    "Seen",
    "bucket",
    "extend",
    "generate",
    "generate_text",
    "pad",
    "sample",
    "settings",
    "start",
    "stream_text",
]
