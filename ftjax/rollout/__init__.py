"""Generation: the same weights that train, adapter unmerged, sampled by the same program that scores them."""

from ftjax.rollout.beam import Beams, beam_search
from ftjax.rollout.engine import Engine
from ftjax.rollout.environment import Environment, Reply
from ftjax.rollout.environments import ENVIRONMENTS, PARSERS, TOOLS
from ftjax.rollout.episodes import Stage, opened, play
from ftjax.rollout.generate import Completion, Decoding, extend, generate, start
from ftjax.rollout.grammar import Grammar
from ftjax.rollout.mixture import both, geometric
from ftjax.rollout.prompts import Encoder, Prompt, bucket, pad
from ftjax.rollout.requests import Episode, Request, Sample
from ftjax.rollout.sampling import Draw, Sampling, Seen, sample, settings
from ftjax.rollout.stopping import shown
from ftjax.rollout.text import generate_text, stream_text
from ftjax.rollout.toolbox import Toolbox
from ftjax.rollout.turns import Turns

__all__ = [
    "Beams",
    "Completion",
    "Decoding",
    "Draw",
    "ENVIRONMENTS",
    "Encoder",
    "Engine",
    "Environment",
    "Episode",
    "Grammar",
    "PARSERS",
    "Prompt",
    "Reply",
    "Request",
    "Sample",
    "Sampling",
    "Seen",
    "Stage",
    "TOOLS",
    "Toolbox",
    "Turns",
    "beam_search",
    "both",
    "bucket",
    "extend",
    "generate",
    "generate_text",
    "geometric",
    "opened",
    "pad",
    "play",
    "sample",
    "settings",
    "shown",
    "start",
    "stream_text",
]
