"""How `ftjax generate` chooses tokens: its flags, which of them mean nothing together, and the completions of many prompts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from ftjax import online, rollout
from ftjax.cli import runtime
from ftjax.cli.pretrained import Adapted
from ftjax.peft.mixed import NONE
from ftjax.rollout import grammar

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
GRAMMARS = ("choice", "regex", "json_schema")


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Define the flags of what is chosen, when a completion ends, and what it must be."""
    absl_flags.DEFINE_integer("max_tokens", 256, "the most tokens of a completion", flag_values=flags, lower_bound=1)
    absl_flags.DEFINE_integer("min_tokens", 0, "how many tokens a completion has before it may end", flag_values=flags, lower_bound=0)
    absl_flags.DEFINE_float("temperature", 0.0, "0: always the most likely token", flag_values=flags)
    absl_flags.DEFINE_integer("top_k", 0, "how many tokens to choose among; 0: all", flag_values=flags)
    absl_flags.DEFINE_float("top_p", 1.0, "the probability mass to choose among", flag_values=flags)
    absl_flags.DEFINE_float("min_p", 0.0, "the least probability, relative to the most likely token's", flag_values=flags)
    absl_flags.DEFINE_float("repetition_penalty", 1.0, "divides the logits of tokens that came before; 1: none", flag_values=flags)
    absl_flags.DEFINE_float("frequency_penalty", 0.0, "taken from a logit for each time that its token was written", flag_values=flags)
    absl_flags.DEFINE_float("presence_penalty", 0.0, "taken from the logits of tokens that were written", flag_values=flags)
    absl_flags.DEFINE_integer("seed", 0, "of the draws", flag_values=flags)
    absl_flags.DEFINE_multi_string("stop", [], "a text that ends a completion; may be given several times", flag_values=flags)
    absl_flags.DEFINE_integer("num_samples", 1, "completions of each prompt, all of which are given", flag_values=flags, lower_bound=1)
    absl_flags.DEFINE_integer("num_beams", 1, "beams of a search for the likeliest completion", flag_values=flags, lower_bound=1)
    absl_flags.DEFINE_float("length_penalty", 1.0, "of beams: above 0 favours long completions, below 0 short ones", flag_values=flags)
    absl_flags.DEFINE_multi_string("choice", [], "a text that a completion is; of several, one", flag_values=flags)
    absl_flags.DEFINE_string("regex", "", "an expression that a completion matches", flags)
    absl_flags.DEFINE_string("json_schema", "", "a JSON schema, or a file with one, of the JSON that a completion is", flags)


def sampling(flags: absl_flags.FlagValues) -> rollout.Sampling:
    """Return the settings of the draws."""
    return rollout.settings(**{name: flags[name].value for name in SETTINGS})


def at_once(flags: absl_flags.FlagValues) -> list[str]:
    """Return the flags that were given of what is not written piece by piece."""
    return [name for name in ("min_tokens", "num_samples", "num_beams", *GRAMMARS) if _given(flags, name)]


def check(flags: absl_flags.FlagValues) -> None:
    """Refuse settings out of their range and flags that mean nothing together, before a model is loaded.

    Raises:
      ValueError: names the flags and what would do.
      ImportError: a library is not installed, with the command that does.
    """
    sampling(flags)
    if "" in flags.stop:
        raise ValueError("generate: --stop= is empty, and every completion has that at once; leave it out.")
    if flags.min_tokens > flags.max_tokens:
        raise ValueError(f"generate: --min_tokens={flags.min_tokens} is more than --max_tokens={flags.max_tokens}.")
    asked = [name for name in GRAMMARS if _given(flags, name)]
    if len(asked) > 1:
        raise ValueError(f"generate: a completion is held to one grammar, not to --{' and --'.join(asked)}.")
    if asked and flags.min_tokens:
        raise ValueError(f"generate: --{asked[0]} says itself how long a completion is; leave --min_tokens out.")
    if asked and asked[0] != "choice" and importlib.util.find_spec("outlines_core") is None:
        raise ImportError(f"generate: --{asked[0]} needs outlines_core, which is not installed: pip install 'ftjax[grammar]'.")
    if flags.json_schema:
        _schema(flags.json_schema)
    if flags.num_beams == 1:
        if _given(flags, "length_penalty"):
            raise ValueError("generate: --length_penalty is of beams; add --num_beams=4.")
        if flags.num_samples > 1 and flags.temperature == 0:
            raise ValueError("generate: at temperature 0 all --num_samples completions are the same; add --temperature=1 or --num_beams.")
        return
    if others := [name for name in (*SETTINGS, "min_tokens", "stop", *GRAMMARS, "seed") if _given(flags, name)]:
        raise ValueError(f"generate: --num_beams looks for the likeliest completion, and heeds no --{others[0]}; leave one of them out.")
    if flags.num_samples > flags.num_beams:
        raise ValueError(f"generate: {flags.num_beams} beams find no more than as many completions, not --num_samples={flags.num_samples}.")


Complete = Callable[[Sequence[np.ndarray], Sequence[int], Sequence[int] | None], list[str]]
"""`(prompts, their numbers, the adapter of each) -> completions`, those of a prompt after each other."""


def completer(adapted: Adapted, encoder: rollout.Encoder, flags: absl_flags.FlagValues, *, num_samples: int) -> Complete:
    """Return what completes prompts.

    Sample `j` of prompt `i` draws with `fold_in(fold_in(key(seed), i), j)`, whatever else is asked for.
    """
    decode = encoder.tokenizer.decode
    if flags.num_beams > 1:
        return lambda prompts, numbers, adapters: [
            decode(tokens, skip_special_tokens=True) for tokens in _beams(adapted, encoder, prompts, flags, num_samples)
        ]
    held, key = _grammar(encoder, flags), jax.random.key(flags.seed)
    options = {"min_tokens": flags.min_tokens, "sampling": sampling(flags), "num_samples": num_samples, "stop": flags.stop, "grammar": held}

    def complete(prompts: Sequence[np.ndarray], numbers: Sequence[int], adapters: Sequence[int] | None) -> list[str]:
        chosen = zip(prompts, numbers, adapters or [NONE] * len(prompts), strict=True)
        requests = [
            rollout.Request(tokens, flags.max_tokens, key=jax.random.fold_in(key, number), adapter=adapter, **options)
            for tokens, number, adapter in chosen
        ]
        slots = min(flags.batch_size, max(1, len(requests) * num_samples))
        engine = rollout.Engine(adapted.model, encoder.eos_ids, tokenizer=encoder.tokenizer, slots=slots)
        return [
            online.words(sample, decode, stop=flags.stop, min_tokens=flags.min_tokens)
            for sample in engine.generate(adapted.params, requests)
        ]

    return complete


def _beams(
    adapted: Adapted, encoder: rollout.Encoder, prompts: Sequence[np.ndarray], flags: absl_flags.FlagValues, num_samples: int
) -> list[list[int]]:
    """Return the tokens of the best completions of each prompt, as many prompts at a time as beams of them are a batch."""
    size, found = max(1, flags.batch_size // flags.num_beams), []
    width = rollout.bucket(max(map(len, prompts)))
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        tokens, segment_ids = rollout.pad([*part, *[part[0]] * (size - len(part))], width=width)
        options = {"num_beams": flags.num_beams, "max_tokens": flags.max_tokens, "length_penalty": flags.length_penalty}
        beams = rollout.beam_search(adapted.model, adapted.params, tokens, segment_ids, eos_ids=encoder.eos_ids, **options)
        written, lengths = np.asarray(beams.tokens), np.asarray(beams.lengths)
        found += [written[row, beam, : lengths[row, beam]].tolist() for row in range(len(part)) for beam in range(num_samples)]
    return found


def _grammar(encoder: rollout.Encoder, flags: absl_flags.FlagValues) -> rollout.Grammar | None:
    if not any(_given(flags, name) for name in GRAMMARS):
        return None
    ends = [token for token in (encoder.tokenizer.eos_token_id, *encoder.eos_ids) if token is not None]
    if not ends:
        raise ValueError("generate: a grammar needs a token that ends a completion, and neither model nor tokenizer has one.")
    held = {"eos_id": ends[0]}
    if flags.choice:
        return grammar.choice(flags.choice, encoder.tokenizer, **held)
    if flags.regex:
        return grammar.regex(flags.regex, encoder.tokenizer, **held)
    return grammar.json_schema(_schema(flags.json_schema), encoder.tokenizer, **held)


def _schema(given: str) -> dict[str, Any]:
    if given.lstrip().startswith("{"):
        return runtime.json_object("json_schema", given)
    if not Path(given).is_file():
        raise ValueError(f"--json_schema: a JSON object is expected, or a file with one; there is no file {given!r}.")
    try:
        return json.loads(Path(given).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--json_schema: {given} is not JSON: {error}.") from error


def _given(flags: absl_flags.FlagValues, name: str) -> bool:
    return flags[name].value != flags[name].default
