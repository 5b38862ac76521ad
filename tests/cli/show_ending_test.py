"""What a run prints at its end: texts of strangers as they are, and a command that can be pasted."""

import io
import shlex

import pytest
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from ftjax import data, logs
from ftjax.cli import show

HOSTILE = 'it\'s [INST] [bold]2[/bold] [/INST] :smile:\n"$(rm)"'
RESULT = {"score": 0.5, "count": 7, "prompts": [HOSTILE], "wanted": ["[/b]"], "completions": ["[/]"]}


def ending(tmp_path, *, random=False, exported=True, name="org/model", workdir="run [a]", reason="finished"):
    folder = epath.Path(tmp_path / workdir)
    folder.mkdir()
    console = Console(file=io.StringIO(), width=200)
    config = ConfigDict({"model": {"random": random, "name": name, "preset": "p"}, "methods": ("lora",)})
    config.eval = ConfigDict({"generate": {"metric": "exact_match", "examples": 64}})
    adapter = folder / "adapter" if exported else None
    show.ending(logs.Terminal(console=console), folder, config, RESULT, RESULT, reason=reason, exported=adapter, seconds=61)
    return console.file.getvalue(), folder


def test_a_prompt_with_brackets_is_printed_as_it_is_and_counted_right(tmp_path):
    out, folder = ending(tmp_path)
    assert "it's [INST] [bold]2[/bold] [/INST] :smile:" in out and "before  [/]" in out and "right   [/b]" in out
    assert "on 7 held-out prompts" in out and f"adapter      {folder}/adapter" in out


@pytest.mark.parametrize(
    ("called", "program"),
    [("/env/bin/ftjax", ["/env/bin/ftjax"]), (".venv/bin/ftjax", [".venv/bin/ftjax"]), ("/x/ftjax/__main__.py", ["python", "-m", "ftjax"])],
)
def test_the_command_to_try_is_one_that_the_shell_reads_back(called, program, tmp_path, monkeypatch):
    monkeypatch.setattr(show.sys, "argv", [called, "train"])
    out, folder = ending(tmp_path)
    command = out[out.index("try it") + len("try it") :]
    wanted = [*program, "generate", "--model=org/model", f"--adapter={folder}/adapter", f"--prompt={HOSTILE}"]
    assert shlex.split(command) == wanted


def test_an_active_environment_needs_no_path(monkeypatch):
    monkeypatch.setattr(show.sys, "argv", ["/env/bin/ftjax"])
    monkeypatch.setattr(show.shutil, "which", lambda name: "/env/bin/ftjax")
    assert show.program() == ["ftjax"]


def test_a_random_model_is_not_worth_a_try(tmp_path):
    assert "generate" not in ending(tmp_path, random=True, workdir="a")[0]
    assert "export" not in ending(tmp_path, random=True, exported=False, workdir="b")[0]
    assert "export --workdir=" in ending(tmp_path, exported=False, workdir="c")[0]


def test_after_early_stopping_the_best_weights_are_offered(tmp_path):
    assert "--step=last" in ending(tmp_path, exported=False, workdir="a")[0]
    assert "--step=best" in ending(tmp_path, exported=False, workdir="b", reason=show.EARLY)[0]


def test_a_source_is_shown_by_its_name():
    class Loader:
        steps_per_epoch, efficiency = 1, 0.5

    console = Console(file=io.StringIO(), width=120)
    console.print(show.sources({"[/x] [red]": data.Report()}, Loader()))
    assert "[/x] [red]" in console.file.getvalue()


def test_the_ending_says_what_became_of_held_out_pairs_and_of_a_student():
    rows = [{"step": 2, "train/loss": 1.0}, {"step": 4, "eval/rewards/accuracy": 0.5}, {"step": 8, "eval/rewards/accuracy": 0.625}]
    assert show.progress(rows) == ["held out: pairs right 50.0% at step 4 → pairs right 62.5% at step 8"]
    assert show.progress([{"step": 4, "eval/agreement": 0.25}]) == ["held out: teacher and student agree 25.0% at step 4"]
    assert show.progress(rows[:1]) == [] == show.progress([{"step": 4, "eval/accuracy": 0.25}])
    assert show.progress([{"step": 4, "eval/accuracy": 0.25, "eval/rewards/desirable": 0.1}]) == ["held out: right 25.0% at step 4"]


@pytest.mark.parametrize(
    ("algorithm", "divergence", "unit"),
    [("sft", "", "nats per token"), ("distill", "jsd", "nats per token"), ("distill", "uld", ""), ("dpo", "", ""), ("reward", "", "")],
)
def test_a_loss_is_in_nats_per_token_only_where_it_is(algorithm, divergence, unit):
    assert show.unit(ConfigDict({"algorithm": algorithm, "teacher": {"divergence": divergence}})) == unit
