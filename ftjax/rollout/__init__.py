"""Generation: the same weights that train, adapter unmerged, sampled by the same program that scores them."""

from ftjax.rollout.generate import Completion, Decoding, extend, generate, start
from ftjax.rollout.prompts import Encoder, Prompt, bucket, pad
from ftjax.rollout.sampling import Draw, Sampling, sample, settings
from ftjax.rollout.text import generate_text, stream_text

__all__ = [
    "Completion",
    "Decoding",
    "Draw",
    "Encoder",
    "Prompt",
    "Sampling",
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
