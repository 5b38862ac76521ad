"""`ftjax COMMAND --flag=…`: find the sub-command, parse its flags, run it, and say in one line what went wrong.

A sub-command is a module `ftjax.cli.<name>` with two functions: `define_flags(flags, argv)` fills an empty absl `FlagValues` of its own
(nothing is global, so absl's and JAX's flags stay out of the help, and a test can call `main` twice), and `main(flags)` does the work and
returns None or an exit code. Its docstring is the head of its help. It is imported only when asked for, so `ftjax --help` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "fine-tune a model as a config says, and measure it before and after",
    "generate": "complete one prompt, a file of prompts, or chat",
    "eval": "measure loss, perplexity and exact match",
    "merge": "fold an adapter into its model and write a Hugging Face folder",
    "export": "write a model as a Hugging Face folder",
    "plan": "say what a step takes of each device and whether it fits",
    "sensitivity": "say which matrices suffer most from 4 or 8 bits",
    "quantize": "store a model's matrices in 4 or 8 bits and write a Hugging Face folder",
    "teach": "write down what a teacher says of a config's data, to distil from without it",
    "inspect": "look at the data: supervised tokens in colour, lengths, problems",
}

_EXPECTED = (ValueError, OSError, ImportError)
"""Errors whose message is written for the user; any other is a bug and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    It is 0 done, 1 an error, 2 a wrong command line, 3 a plan that does not fit, 130 aborted by a second Ctrl-C, 141 the
    reader of a pipe has gone, as `head` does.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more when it ends
        return 141


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        from ftjax import __version__

        print(f"ftjax {__version__}")
        return 0
    name, arguments = argv[0].replace("-", "_"), argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        return _complain(f"there is no command {argv[0]!r}; nearest: {close!r}. `ftjax --help` lists them.", 2)
    return _run(name, arguments)


def overview() -> str:
    """Return what `ftjax --help` prints."""
    lines = ["usage: ftjax COMMAND [--flag=value …]", "", "Fine-tune and align language models in JAX and Flax.", "", "commands:"]
    lines += [f"  {name:12s}{text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "`ftjax COMMAND --help` shows the flags of a command. Start with:", "", f"  {START}"])


START = "ftjax train --config=configs/quickstart.py --workdir=runs/quickstart"


def _run(name: str, arguments: list[str]) -> int:
    from absl import flags as absl_flags

    module = importlib.import_module(f"ftjax.cli.{name}")
    flags = absl_flags.FlagValues()
    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    arguments = [argument for argument in arguments if argument not in ("-h", "--help")]
    try:
        module.define_flags(flags, arguments)
        positional = flags([f"ftjax {name}", *arguments])[1:]
        if wants_help:
            print(command_help(name, module, flags))
            return 0
        if positional:
            raise absl_flags.Error(f"unexpected argument {positional[0]!r}: values are given as --flag=value")
    except absl_flags.Error as error:
        return _complain(f"{_sentence(error)}\n`ftjax {name} --help` shows the flags.", 2)
    except _EXPECTED as error:
        return _fail(error)
    try:
        return module.main(flags) or 0
    except _EXPECTED as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _complain("aborted", 130)


def command_help(name: str, module, flags) -> str:
    """Return the help of a sub-command: its docstring, its flags, and the fields of its config if it has one."""
    lines = [f"usage: ftjax {name} [--flag=value …]", "", module.__doc__.strip(), "", "flags:"]
    for flag_name in sorted(flags):
        flag = flags[flag_name]
        if "." in flag_name:
            continue
        default = "" if flag.default in (None, False, "") else f" (default: {flag.default_as_str})"
        lines.append(f"  --{flag_name:20s} {flag.help}{default}")
    if "config" in flags:
        from ftjax.cli import config

        lines += ["", *config.help_lines(flags["config"].value)]
    return "\n".join(lines)


def _sentence(error: Exception) -> str:
    """Return absl's message without its repetition of the flag's help."""
    return re.sub(r"\s+", " ", str(error)).strip()


def _fail(error: Exception) -> int:
    if os.environ.get("FTJAX_TRACEBACK") or isinstance(error, BrokenPipeError):
        raise error
    return _complain(f"{error}\n(FTJAX_TRACEBACK=1 shows where this came from)", 1)


def _complain(message: str, code: int) -> int:
    print(f"ftjax: {message}", file=sys.stderr)
    return code
