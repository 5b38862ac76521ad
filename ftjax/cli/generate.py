"""Complete one prompt, a file of prompts, or chat.

  ftjax generate --prompt="Why is the sky blue?"                                streams to the terminal
  ftjax generate --prompts=questions.txt --output=answers.jsonl                 one object a line: prompt and completion
  ftjax generate --adapter=runs/quickstart                                      a chat; /reset forgets, /exit or Ctrl-D ends
  ftjax generate --prompts=… --best_of=8 --temperature=1 --reward=runs/reward    the best of eight answers, by a reward model
  ftjax generate --prompts=… --num_samples=4 --temperature=1                     all four, in a list `completions`
  ftjax generate --prompt=… --json_schema='{"type": "object", …}'                JSON of a schema; or --regex=…, or --choice=yes --choice=no
  ftjax generate --adapter=a=DIR --adapter=b=DIR --prompts=rows.jsonl            each row by the adapter that its column `adapter` names

A file of prompts is .txt (one a line), or .jsonl, .json, .csv or .parquet with a column `prompt` (a text or a list of messages),
`messages`, `question`, or the columns of another format that `ftjax train` reads; an answer at the end is left out. A text is sent as a
user's message where the model has a chat template, and continued as it is with --raw. Rows of one batch may have different
adapters; a row without one, or with null, is completed by the model itself. Lines go to FILE.partial as they are finished, and that becomes
FILE when all are there. What cannot be written piece by piece (--min_tokens, --num_samples, --num_beams, a grammar) comes as such a line
for --prompt too. A prompt, by its number, gets the same draws for a --seed in all of these ways.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags as absl_flags
from etils import epath

from ftjax import data, peft, rollout
from ftjax.cli import critic, decoding, pretrained, products, runtime
from ftjax.cli.pretrained import Adapted
from ftjax.data.sources import open_file
from ftjax.tree import nearest

WINDOW_BATCHES = 8
"""Batches between two writes of the output: within them prompts are sorted by length."""


class Asked(NamedTuple):
    """A prompt as the file has it, what the model is given, where it stands, and the name of its adapter."""

    shown: Any
    prompt: rollout.Prompt
    where: str
    adapter: str | None = None


def define_flags(flags: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of `ftjax generate`."""
    del argv
    pretrained.define_flags(flags)
    absl_flags.DEFINE_string("prompt", None, "one prompt", flags)
    absl_flags.DEFINE_string("prompts", None, "a file of prompts", flags)
    absl_flags.DEFINE_string("output", None, "a .jsonl file for the completions (default: the terminal)", flags)
    absl_flags.DEFINE_string("system", None, "a system message before every prompt that is a text", flags)
    absl_flags.DEFINE_bool("raw", False, "continue texts as they are, without the chat template", flags)
    absl_flags.DEFINE_string("template_variables", "", 'JSON: what the chat template reads, as in {"enable_thinking": false}', flags)
    decoding.define_flags(flags)
    absl_flags.DEFINE_integer("batch_size", 32, "prompts of a file generated at a time", flag_values=flags, lower_bound=1)
    absl_flags.DEFINE_integer(
        "best_of", 1, "completions of each prompt, of which --reward keeps the best", flag_values=flags, lower_bound=1
    )
    absl_flags.DEFINE_string("reward", "", "a reward model: a classifier's folder, or the workdir of a run with a value head", flags)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Generate."""
    if flags.prompt is not None and flags.prompts is not None:
        raise ValueError("generate: --prompt and --prompts were both given; one of them is enough.")
    chatting = flags.prompt is None and flags.prompts is None
    if chatting and not sys.stdin.isatty():
        raise ValueError("generate: nothing to complete; give --prompt=TEXT or --prompts=FILE, or start it in a terminal to chat.")
    if flags.output:
        runtime.local_path("output", flags.output)
    decoding.check(flags)  # a wrong setting should not have to wait for the model
    _check_best(flags, chatting)
    asked = _asked(flags)
    _check_adapters(asked, flags)
    variables = runtime.json_object("template_variables", flags.template_variables)
    runtime.start(flags)
    adapted = pretrained.load(flags)
    if said := products.while_decoding(adapted.params, rows=1 if flags.prompts is None else flags.batch_size):
        print(said, file=sys.stderr)
    encoder = rollout.Encoder(adapted.model, adapted.tokenizer, template_variables=variables)
    encoders = {name: rollout.Encoder(adapted.model, one, template_variables=variables) for name, one in adapted.tokenizers.items()}
    if chatting:
        chat(adapted, encoder, flags)
    elif flags.prompts is None and not flags.output and not flags.reward and not decoding.at_once(flags):
        say(adapted, encoder, _wrapped(flags.prompt, encoder, flags), flags)
    else:
        complete(adapted, {None: encoder, **encoders}, asked, flags)


def read_prompts(path: str) -> list[Asked]:
    """Return the prompts of a file.

    Raises:
      ValueError: there is no such file, it is empty, or a row holds no prompt; the message names file and line.
    """
    if not Path(path).is_file():
        raise ValueError(f"--prompts: there is no file {path!r}.")
    if path.endswith((".txt", ".txt.gz")):
        text = open_file(epath.Path(path))
        lines = text.read(0)["text"].split("\n") if text.size else []
        asked = [Asked(line, line, f"{path}:{at}") for at, line in enumerate(lines, 1) if line.strip()]
    else:
        source = open_file(epath.Path(path))
        rows = ((source.read(at), source.where(at)) for at in range(source.size))
        asked = [_from_row(row, where)._replace(adapter=row.get("adapter") or None) for row, where in rows]
    if not asked:
        raise ValueError(f"--prompts: {path} holds no prompt.")
    return asked


def complete(
    adapted: Adapted, encoders: Mapping[str | None, rollout.Encoder], asked: Sequence[Asked], flags: absl_flags.FlagValues
) -> None:
    """Complete many prompts and write a line for each, in their order; with a reward model the best of several completions."""
    count, judge = max(flags.best_of, flags.num_samples), critic.load(flags.reward, dtype=flags.dtype) if flags.reward else None
    encoder = _common_encoder({one.adapter: encoders[one.adapter] for one in asked})
    encoded = [_encoded(encoders[one.adapter], one, flags) for one in asked]
    adapters = peft.row_indices([one.adapter for one in asked], adapted.tokenizers) if adapted.tokenizers else None
    completed = decoding.completer(adapted, encoder, flags, num_samples=count)
    size, began = -(-WINDOW_BATCHES * flags.batch_size // count), time.monotonic()
    with _lines(flags.output) as write:
        for first in range(0, len(encoded), size):
            window = range(len(encoded))[first : first + size]
            texts = completed([encoded[at] for at in window], window, adapters and [adapters[at] for at in window])
            given = [_wrapped(asked[at].prompt, encoders[asked[at].adapter], flags) for at in window for _ in range(count)]
            rewards = judge(given, texts) if judge else None
            for at, number in enumerate(window):
                one, group = asked[number], slice(at * count, (at + 1) * count)
                several = {"completions": texts[group]} if flags.num_samples > 1 else {"completion": texts[group][0]}
                kept = critic.best(texts[group], rewards[group]) if judge else several
                write({"prompt": one.shown, **({"adapter": one.adapter} if adapters else {}), **kept})
            seconds = time.monotonic() - began
            print(f"{window[-1] + 1:,} of {len(asked):,} prompts, {seconds:.0f} s", file=sys.stderr, flush=True)


def _check_best(flags: absl_flags.FlagValues, chatting: bool) -> None:
    """Refuse a choice among completions that are all the same, or that nobody judges."""
    if flags.best_of > 1 and not flags.reward:
        raise ValueError("generate: --best_of needs a reward model that says which is best; add --reward=FOLDER.")
    if flags.best_of > 1 and (flags.num_samples > 1 or flags.num_beams > 1):
        raise ValueError("generate: --best_of keeps one of several samples, so --num_samples and --num_beams mean nothing beside it.")
    if flags.num_samples > 1 and flags.reward:
        raise ValueError("generate: --num_samples gives all completions, and --reward keeps the best: use --best_of instead.")
    if chatting and (others := decoding.at_once(flags)):
        raise ValueError(f"generate: a chat streams, and so has no --{others[0]}; give --prompt or --prompts.")
    if flags.best_of > 1 and flags.temperature == 0:
        raise ValueError("generate: at temperature 0 all --best_of completions are the same; add --temperature=1.")
    if flags.reward and chatting:
        raise ValueError("generate: --reward judges the completions of --prompt or --prompts, not a chat.")


def _check_adapters(asked: Sequence[Asked], flags: absl_flags.FlagValues) -> None:
    """Refuse named adapters without rows that could name them, and rows that name one which is not there."""
    names = [name for name in pretrained.adapter_folders(flags.adapter) if name]
    if names and flags.num_beams > 1:
        raise ValueError("generate: --num_beams is of one model, and rows with adapters of their own are of several; run them one by one.")
    if names and flags.prompts is None:
        raise ValueError("generate: adapters with names are for --prompts, whose rows choose; give --adapter=FOLDER here.")
    for one in asked:
        if one.adapter is not None and one.adapter not in names:
            raise ValueError(
                f"{one.where}: there is no adapter {one.adapter!r}; nearest: {nearest(str(one.adapter), names)}. Add --adapter=NAME=FOLDER."
            )


def _common_encoder(encoders: Mapping[str | None, rollout.Encoder]) -> rollout.Encoder:
    """Return one whose tokenizer reads all completions; adapters with other tokens than others cannot share a batch with them."""
    first, *others = encoders
    for name in others:
        one, other = encoders[first], encoders[name]
        if one.eos_ids != other.eos_ids or one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise ValueError(
                f"generate: adapters {first!r} and {name!r} have other tokens or ends of a turn (None is the model); run them one by one."
            )
    return encoders[first]


def say(adapted: Adapted, encoder: rollout.Encoder, prompt: rollout.Prompt, flags: absl_flags.FlagValues, *, turn: int = 0) -> str:
    """Stream the completion of one prompt to the terminal and return it."""
    pieces, key = [], jax.random.fold_in(jax.random.key(flags.seed), turn)  # of which the sample, the first, has fold_in(key, 0)
    options = {"max_tokens": flags.max_tokens, "sampling": decoding.sampling(flags), "key": key, "stop": flags.stop}
    for piece in rollout.stream_text(adapted.model, adapted.params, encoder, prompt, **options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def chat(adapted: Adapted, encoder: rollout.Encoder, flags: absl_flags.FlagValues) -> None:
    """Talk until `/exit` or the end of the input; Ctrl-C ends a reply, not the chat."""
    start = [{"role": "system", "content": flags.system}] if flags.system else []
    messages, turn = list(start), 0
    print(f"{adapted.name}{f' with {adapted.adapter}' if adapted.adapter else ''}: /reset forgets, /exit or Ctrl-D ends")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(start)
            print("(forgotten)")
        elif text:
            turn += 1
            prompt = [*messages, {"role": "user", "content": text}] if encoder.chats and not flags.raw else text
            try:
                reply = say(adapted, encoder, prompt, flags, turn=turn)
            except KeyboardInterrupt:
                print("\n(stopped; this turn is forgotten)")
            except ValueError as error:
                print(f"({error}; /reset begins anew)")
            else:
                messages = [*prompt, {"role": "assistant", "content": reply}] if encoder.chats and not flags.raw else messages


def _asked(flags: absl_flags.FlagValues) -> list[Asked]:
    if flags.prompts is not None:
        return read_prompts(flags.prompts)
    return [] if flags.prompt is None else [Asked(flags.prompt, flags.prompt, "--prompt")]


def _from_row(row: dict[str, Any], where: str) -> Asked:
    """Return the prompt of a row: its column `prompt` or `question`, or the messages before the answer of a training example."""
    shown = row.get("prompt", row.get("question"))
    if isinstance(shown, str):
        return Asked(shown, shown, where)
    if shown is not None:
        row = {"messages": shown}
    (example, *_) = data.parse(row, where=where)
    if example.text is not None:
        return Asked(example.text, example.text, where)
    messages = list(example.messages[:-1] if example.messages[-1]["role"] == "assistant" else example.messages)
    if shown is None and len(messages) == 1 and "messages" not in row:
        return Asked(messages[0]["content"], messages[0]["content"], where)
    return Asked(messages, messages, where)


def _wrapped(prompt: rollout.Prompt, encoder: rollout.Encoder, flags: absl_flags.FlagValues) -> rollout.Prompt:
    """Return a text as a user's message, if the model has a template for it and the flags want it."""
    if not isinstance(prompt, str) or flags.raw or not encoder.chats:
        return prompt
    system = [{"role": "system", "content": flags.system}] if flags.system else []
    return [*system, {"role": "user", "content": prompt}]


def _encoded(encoder: rollout.Encoder, one: Asked, flags: absl_flags.FlagValues):
    try:
        return encoder.fit(_wrapped(one.prompt, encoder, flags), max_tokens=flags.max_tokens)
    except ValueError as error:
        raise ValueError(f"{one.where}: {error}.") from error


@contextlib.contextmanager
def _lines(output: str | None) -> Iterator[Any]:
    """Yield `write(row)`, one JSON object a line: to the terminal, or to a file that has its name only once it is complete."""
    if output is None:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    partial = Path(f"{output}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    os.replace(partial, output)
    print(f"written: {output}", file=sys.stderr)
