"""`ftjax sensitivity` prints what each kind of matrix suffers, and flags that a run takes."""

import pathlib
import re

from ftjax.cli import main

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"


def test_the_report_ends_in_flags_that_train_takes(capsys):
    arguments = ["--format=int4", "--config.int4.targets=mlp", "--batches=1", "--share=0.5"]
    assert main.main(["sensitivity", f"--config={CONFIG}", "--compile_cache=off", *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert len(re.findall(r"layers/mlp/[a-z]+_proj/kernel 4,096 0\.0\d+ [01]: 0\.0\d+ [+-]0\.\d{5} ", out)) == 3
    assert re.search(r"--config\.int4\.exclude=(layers/mlp/[a-z]+_proj/kernel) --config\.int8\.targets=\1 and", out)
    assert out.endswith("and in the config: methods = ('int4', 'int8', 'lora')")
