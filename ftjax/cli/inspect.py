"""Look at the data of a config before training on it.

  ftjax inspect --config=configs/quickstart.py --rows=5

Prints what each source holds, a histogram of lengths, what seems wrong, and some sequences with the trained tokens in colour.
The model's tokenizer is needed, its weights are not.
"""

from __future__ import annotations

import numpy as np
from absl import flags as absl_flags
from rich.console import Console

from ftjax import logs
from ftjax.cli import build, rollouts, runtime, show
from ftjax.cli import config as configs
from ftjax.data import inspect

PROMPTS = 1000
"""Examples of each source whose prompts are rendered alone and compared."""


def define_flags(flags: absl_flags.FlagValues, argv) -> None:
    """Define the flags of `ftjax inspect`."""
    configs.define(flags, argv)
    absl_flags.DEFINE_integer("rows", 3, "how many sequences to print", lower_bound=0, flag_values=flags)
    absl_flags.DEFINE_bool("held_out", False, "look at the held-out data instead", flag_values=flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Print what a person should know of the data."""
    if flags.config is None:
        raise ValueError("inspect: --config=FILE is needed, as in: ftjax inspect --config=configs/quickstart.py")
    runtime.start(flags)
    config, terminal = build.resolved(flags.config), logs.Terminal(console=Console(highlight=False))
    tokenizer = build.tokenizer(config)
    encoder = build.encoder(config, tokenizer)
    loader, reports = build.loader(config, encoder, build.mesh(config), held_out=flags.held_out)
    terminal.heading("Sources")
    if rollouts.used(config):
        terminal.say(show.prompts(reports, loader, samples=config.rollout.samples_per_prompt, stride=rollouts.stride(config)))
        terminal.heading("Lengths of prompts in tokens")
        terminal.say(show.histogram(inspect.histogram(np.asarray([len(prompt.tokens) for prompt in loader.prompts]))))
        for prompt in loader.prompts[: flags.rows]:
            terminal.panel(tokenizer.decode(prompt.tokens.tolist()), f"answer: {prompt.columns['answer']}")
        return
    terminal.say(show.sources(reports, loader))
    terminal.heading("Lengths in tokens")
    terminal.say(show.histogram(inspect.histogram(loader.sequences.lengths)))
    terminal.heading("Problems")
    whole = sum(reports.values(), start=type(next(iter(reports.values())))())
    first = build.first_examples(config, PROMPTS, held_out=flags.held_out)
    found = inspect.problems(whole, loader.sequences, tokenizer) + inspect.prompt_problems(encoder, first) + whole.first_errors
    terminal.say("\n".join(f"- {problem}" for problem in found) or "none found")
    terminal.heading("Sequences")
    terminal.say(show.preview(loader, tokenizer, count=flags.rows, console=terminal.console))
