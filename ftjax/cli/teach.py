"""Ask a teacher once about all texts of a config, and write down what it says; training from that loads no teacher.

  ftjax teach --config=configs/distill_smollm2.py --output=said.safetensors              its 32 most likely tokens in every place
  ftjax teach --config=… --output=… --top_k=64                                           or more
  ftjax train --config=configs/distill_smollm2.py --config.teacher.file=said.safetensors --config.teacher.divergence=forward_kl --workdir=…

What is learnt then is the forward KL over these tokens and one more that stands for the rest, a lower bound of the whole. A file is refused
for another teacher, or where rows, template, tokenizer or max_tokens have changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from absl import flags as absl_flags

from ftjax import scoring, sharding
from ftjax.cli import build, objective, reference, runtime, said, show, teaching
from ftjax.cli import config as configs
from ftjax.logs.terminal import megabytes


def define_flags(flags: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of `ftjax teach`."""
    configs.define(flags, argv)
    absl_flags.DEFINE_string("output", None, "the .safetensors file to write", flag_values=flags)
    absl_flags.DEFINE_integer("top_k", 32, "tokens that are kept in every place", flag_values=flags, lower_bound=1)
    runtime.define_flags(flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Ask the teacher and write the file."""
    if flags.config is None or not flags.output:
        missing = "--output=FILE.safetensors" if flags.config is not None else "--config=FILE"
        raise ValueError(f"teach: {missing} is needed.")
    output, config = runtime.local_path("output", flags.output), build.resolved(flags.config)
    with config.unlocked():
        objective.teacher_block(config).file = ""  # the teacher itself is asked
    runtime.start(flags)
    if jax.process_count() > 1:
        raise ValueError("teach: one process asks the teacher and writes the file; start it alone.")
    mesh = build.mesh(config)
    teacher = build.model(teaching.alone(config), mesh)
    tokenizer = build.tokenizer(config)
    teaching.check_tokens(config, tokenizer, teacher)
    if flags.top_k > teacher.model.config.vocab_size:
        raise ValueError(f"teach: --top_k={flags.top_k} is more than the {teacher.model.config.vocab_size:,} tokens that there are.")
    print(f"asking {show.model(teacher)}")
    model = sharding.on_mesh(teacher.model, mesh)
    look = jax.jit(partial(scoring.likeliest, model, count=flags.top_k, batch_shards=sharding.row_parts(mesh)))
    encoder, found = build.encoder(config, tokenizer), {}
    for field in said.FIELDS:
        if not config.data[field]:
            continue
        sequences = build.loader(config, encoder, mesh, held_out=field == "eval_sources")[0].sequences
        heard = said.ask(
            sequences,
            lambda batch: look(teacher.params, build.on_mesh(batch, mesh)),
            rows=config.data.batch_size,
            width=config.data.max_tokens,
        )
        found[field] = sequences, heard
        covered = float(np.exp(heard.logps).sum(axis=-1).mean())
        print(f"data.{field}: {len(heard.ids):,} places; {flags.top_k} tokens have {covered:.1%} of the teacher's probability there")
    said.write(output, config, found, fingerprint=reference.fingerprint(teacher.model, teacher.params))
    print(f"wrote {output}, {megabytes(output.stat().st_size)}")
