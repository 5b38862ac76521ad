"""Runs on judged responses: what a run and `ftjax inspect` say of them, and the kinds that no config of ours trains."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
from rich.console import Console

from ftjax import logs
from ftjax.cli import build, main, objective
from ftjax.cli import config as configs
from ftjax.cli.run import Run, read
from ftjax.logs.writers import read_jsonl

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
PAIR = {"prompt": "a", "chosen": "yes", "rejected": "no"}


def said(tmp_path, rows, *, algorithm="kto", packing="none", **loss):
    """What a run says of its data before it begins."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.load(f"{FOLDER / 'dpo_smollm2_hh.py'}:smoke").unlock()
    config.algorithm, config.loss, config.data.packing, config.data.bad_rows = algorithm, loss, packing, "skip"
    config.data.sources.hh.update({"path": str(path), "split": "train"})
    config.data.eval_sources = {}
    terminal = logs.Terminal(console=Console(file=io.StringIO(), width=200))
    read(Run(config, {}, tmp_path, None, build.mesh(config), terminal, None), build.tokenizer(config))
    return terminal.console.file.getvalue()


def test_a_run_says_when_the_classes_of_kto_weigh_too_differently(tmp_path):
    rows = [{"prompt": f"{n}", "completion": "yes", "label": n % 4 == 0} for n in range(8)]
    assert "desirable responses weigh 0.33 times what undesirable ones do" in said(tmp_path, rows)
    assert "responses weigh" not in said(tmp_path, rows, desirable_weight=3.5)


def test_a_run_says_that_pairs_are_the_same_and_leaves_them_out(tmp_path):
    out = said(tmp_path, [PAIR, {**PAIR, "rejected": "yes"}, {**PAIR, "chosen": " "}], algorithm="dpo")
    assert "1 left out: chosen and rejected are the same" in out and "1 left out: is an empty response" in out


def test_a_run_on_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all 2 responses are desirable"):
        said(tmp_path, [{"prompt": "a", "completion": "b", "label": True}] * 2)


def test_kto_is_refused_rows_without_neighbours_before_anything_is_loaded(tmp_path, capsys):
    more = ["--config.data.batch_size=1", "--config.data.accumulation=1", f"--workdir={tmp_path}", "--compile_cache=off"]
    assert main.main(["train", f"--config={FOLDER / 'kto_smollm2_hh.py'}:smoke", *more]) == 1
    assert "data.batch_size: 'kto' compares with what prompts of the same batch say" in capsys.readouterr().err


def test_pairs_are_shown_as_they_are_trained(tmp_path, capsys):
    out = said(tmp_path, [{**PAIR, "margin": 2}, {**PAIR, "margin": 1}], algorithm="dpo", packing="best_fit")
    assert "pair 1: chosen, by 2" in out and "⟦yes<|im_end|>⟧" in out and "pair 1: rejected" in out and "⟦no<|im_end|>⟧" in out
    assert out.index("pair 1: rejected") < out.index("pair 2: chosen, by 1")
    assert main.main(["inspect", f"--config={FOLDER / 'dpo_smollm2_hh.py'}:smoke", "--rows=1", "--compile_cache=off"]) == 0
    out = capsys.readouterr().out
    assert "pair 1: chosen" in out and "pair 1: rejected" in out and "pair 2" not in out


@pytest.mark.parametrize(("kind", "group_tokens"), [("sliding_attention", 0), ("full_attention", 4)])
def test_prompts_stand_once_only_where_attention_goes_by_positions(kind, group_tokens):
    config = configs.load(f"{FOLDER / 'dpo_smollm2_hh.py'}:smoke")
    model = build.architecture(config)[0]
    kinds = (kind,) * model.config.num_hidden_layers
    near = model._replace(config=dataclasses.replace(model.config, sliding_window=8, layer_types=kinds))
    config.model.group_tokens = group_tokens
    with pytest.raises(ValueError, match="data.packing: 'shared' is not for .*; set it to 'best_fit'"):
        objective.score(config, near, build.mesh(config))
    config.data.packing = "best_fit"
    objective.score(config, near, build.mesh(config))


def test_single_responses_are_shown_with_what_was_judged(tmp_path):
    out = said(tmp_path, [{"prompt": "a", "completion": "b", "label": False}, {"prompt": "a", "completion": "c", "label": True}])
    assert "undesirable" in out and "─ desirable" in out
    steps = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
    assert "steps 1, 0" in said(tmp_path, [steps], algorithm="process_reward")


CONFIG = """
from configs import base


def get_config(arg=""):
    config = base.judged("{algorithm}")
    config.methods = {methods}
    config.data.sources.rows = base.source("tasks:compare")
    config.data.eval_sources.rows = base.source("tasks:compare", split="test")
    return base.finish(config, arg, tiny="tiny-llama")
"""
FORGOTTEN = """
from configs import base


def get_config(arg=""):
    config = base.judged("npo", beta=0.1)
    config.data.sources.forget = base.source("forget.jsonl")
    return base.finish(config, arg, tiny="tiny-llama")
"""
KINDS = {"tpo": ("lora",), "process_reward": ("lora", "value_head")}


def trained(config, folder, compiled, *flags):
    """What a short run of a config says of its steps."""
    path = folder / "configs" / "tried.py"
    path.parent.mkdir()
    (path.parent / "base.py").symlink_to(FOLDER / "base.py")
    path.write_text(config)
    command = ["train", f"--config={path}:smoke", f"--workdir={folder / 'run'}", f"--compile_cache={compiled}"]
    more = ["--config.optimizer.learning_rate=0.01", "--config.steps=6", "--config.eval.every_steps=0", "--config.checkpoint.every_steps=0"]
    assert main.main([*command, *more, *flags]) == 0
    return [row for row in read_jsonl(folder / "run" / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")
@pytest.mark.parametrize("algorithm", KINDS)
def test_triples_and_steps_are_learnt_from(algorithm, tmp_path, compiled):
    rows = trained(CONFIG.format(algorithm=algorithm, methods=KINDS[algorithm]), tmp_path, compiled)
    losses = [row["train/loss"] for row in rows]
    assert len(losses) == 6 and np.mean(losses[-2:]) < losses[0] - 0.05
    if algorithm == "process_reward":  # two steps each, of which the second is wrong
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and rows[0]["train/labels"] == 0.5


@pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")
def test_what_is_to_be_forgotten_alone_is_forgotten(tmp_path, compiled):
    """NPO without a set to keep, as in its paper: the loss begins at (2 / β) log 2."""
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "secret", "label": False}) + "\n" for n in range(64)))
    flags = (f"--config.data.sources.forget.path={path}", "--config.data.sources.forget.split=train")
    rows = trained(FORGOTTEN, tmp_path, compiled, *flags)
    assert rows[0]["train/loss"] == pytest.approx(20 * np.log(2), rel=1e-5)
    assert rows[-1]["train/logps/undesirable"] < rows[0]["train/logps/undesirable"] - 1
