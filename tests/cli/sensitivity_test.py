"""`ftjax sensitivity` prints what each kind of matrix suffers, and flags that a run takes."""

import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from ftjax import models, quant, tree
from ftjax.cli import build, main
from ftjax.cli import config as configs

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"


def config_of(arguments):
    """The config of a command line."""
    flags, argv = absl_flags.FlagValues(), ["train", f"--config={CONFIG}", *arguments]
    configs.define(flags, argv)
    flags(argv)
    return flags.config


@pytest.mark.parametrize("rest", ["int8", "bfloat16"])
def test_the_report_ends_in_flags_that_train_takes(rest, tmp_path, capsys):
    arguments = ["--format=int4", "--config.int4.targets=mlp", "--batches=1", "--share=0.5", f"--rest={rest}"]
    output = tmp_path / "errors.jsonl"
    assert main.main(["sensitivity", f"--config={CONFIG}", "--compile_cache=off", f"--output={output}", *arguments]) == 0
    out = capsys.readouterr().out
    shown = re.findall(r"(layers/mlp/[a-z]+_proj/kernel) 4,096 0\.0\d+ ([01]): (0\.0\d+) [+-]0\.\d{5} ", " ".join(out.split()))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(shown) == 3
    for (kind, layer, worst), row in zip(shown, rows, strict=True):
        assert row["kind"] == kind and len(row["errors"]) == 2 and np.argmax(row["errors"]) == int(layer)
        assert max(row["errors"]) == pytest.approx(float(worst), abs=1e-4) and abs(row["loss_rise"]) < 0.1

    given = shlex.split(out.splitlines()[-1])
    method = build.method(config_of(["--config.int4.targets=mlp", *given]))
    params = models.build(models.preset("tiny-llama")).init
    frozen, trainable = jax.eval_shape(lambda key: method.init(key, params(key)), jax.random.key(0))
    formats = {path: leaf.format for path, leaf in tree.flatten(frozen).items() if isinstance(leaf, quant.PackedWeight)}
    (left,) = {kind for kind, _, _ in shown} - {path for path, format in formats.items() if format == "int4"}
    assert left == rows[0]["kind"] and formats.get(left) == {"int8": "int8", "bfloat16": None}[rest] and trainable
