"""The command line reads well, is quick, and knows what a user meant."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from ftjax.cli import build, main, members
from ftjax.cli import config as configs

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main.main(list(argv))
    return code, *capsys.readouterr()


def test_help_lists_every_command_and_imports_nothing_heavy():
    script = "import sys; from ftjax.cli.main import main; main(['--help']); assert not {'jax', 'absl', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, line in main.COMMANDS.items():
        assert f"  {name}" in done.stdout and line in done.stdout and len(line) < 80
    assert main.START in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "ftjax", *arguments], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_commands_help_shows_its_own_flags_and_no_others(name, capsys):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: ftjax {name} ") and "--compile_cache" in out
    assert not any(noise in out for noise in ("--logtostderr", "--flagfile", "--jax_", "--pdb", "!!python"))


def test_the_help_of_train_shows_the_fields_of_its_config(capsys):
    code, out, _ = run(capsys, "train", f"--config={QUICKSTART}", "--config.seed=7", "--help")
    assert code == 0 and "  optimizer.learning_rate " in out and "  seed                             7" in out and "--workdir" in out


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2 and "nearest: 'train'" in err


WRONG = {
    "--config.optimizer.learnin_rate=1": (1, "'optimizer.learning_rate'"),
    "--config.lora.alhpa=1": (1, "'lora.alpha'"),
    "--config.steps=many": (2, "--config.steps=many"),
    "--config.optimizer.b1=high": (2, "could not convert"),
    "--config.optimizer=3": (2, "not a dict"),
    "--wrkdir=x": (2, "Did you mean: workdir"),
    "stray": (2, "unexpected argument 'stray'"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_mistyped_argument_is_an_error_that_says_what_was_meant(argument, capsys):
    code, wanted = WRONG[argument]
    found, _, err = run(capsys, "train", f"--config={QUICKSTART}", argument)
    assert found == code and wanted in err and "Traceback" not in err


def test_a_field_without_a_config_asks_for_the_config(capsys):
    code, _, err = run(capsys, "train", "--config.steps=3")
    assert code == 1 and "--config=FILE" in err


def test_a_missing_config_file_is_answered_with_the_nearest(capsys):
    code, _, err = run(capsys, "train", f"--config={QUICKSTART.replace('quick', 'quik')}")
    assert code == 1 and "quickstart.py" in err


MISTYPED = {
    "config.step = 3": "'step' in this block; nearest: 'steps'",
    "config.optimizer.update({'learning_rat': 1})": "'learning_rat' in this block; nearest: 'learning_rate'",
    "config.lora.rnak = 3": "'rank'",
    "config.optimizr.b1 = 0.5": "'optimizer'",
    "config.data.sources.mine.pth = 'x'": "'path'",
    "config.data.eval_source.mine = base.source('x')": "'eval_sources'",
}


@pytest.mark.parametrize("line", MISTYPED)
@pytest.mark.parametrize("unlocked", [False, True])
def test_a_mistyped_field_in_a_config_file_is_an_error_that_says_what_was_meant(line, unlocked, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    own = "    with config.unlocked():\n        config.mine = 3\n" if unlocked else ""
    lines = f"    config.data.sources.mine = base.source('a')\n{own}    {line}\n    return base.finish(config, arg, tiny='tiny-llama')\n"
    file = tmp_path / "typo.py"
    file.write_text(f"from configs import base\ndef get_config(arg=''):\n    config = base.sft()\n{lines}")
    code, _, err = run(capsys, "train", f"--config={file}")
    assert code == 1 and MISTYPED[line] in err and f"typo.py:{7 if unlocked else 5}" in err


def test_a_finished_config_is_locked_to_its_sources(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    config = configs.load(QUICKSTART)
    for block in (config, config.data, config.data.sources, config.data.eval_sources, config.data.sources.tasks):
        with pytest.raises(AttributeError):
            block.new = 1


@pytest.mark.parametrize("argument", ["--workdir=x", f"--config={QUICKSTART}"])
def test_train_says_what_is_missing(argument, capsys):
    code, _, err = run(capsys, "train", argument)
    assert code == 1 and "is needed, as in: ftjax train" in err


def test_a_config_is_found_and_finds_its_base_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path)
    assert configs.load(f"{QUICKSTART}:smoke").steps == 4
    assert sys.path == before


def test_overrides_have_the_types_of_their_fields(capsys):
    arguments = ["--config", f"{QUICKSTART}:smoke", "--config.methods=full", "--config.methods=lora", "--config.lora.targets=['q_proj']"]
    arguments += ["--config.data.template_variables={'enable_thinking': False}"]
    arguments += ["--config.optimizer.groups=(('lora/.*/b',16.0),)", "--noconfig.data.shuffle", "--help"]
    code, out, _ = run(capsys, "train", *arguments)
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ") and len(line.split()) > 1}
    assert code == 0
    assert lines["methods"] == "('full', 'lora')" and lines["optimizer.groups"] == "(('lora/.*/b', 16.0),)"
    assert lines["data.template_variables.enable_thinking"] == "False"
    assert lines["lora.targets"] == "['q_proj']" and lines["data.shuffle"] == "False"


@pytest.mark.parametrize(
    "flags, methods",
    [
        (["bitfit"], ("bitfit",)),
        (["nf4,lora"], ("nf4", "lora")),
        (["nf4, lora", "neftune"], ("nf4", "lora", "neftune")),
        (["('nf4','lora')"], ("nf4", "lora")),
        (["'nf4,lora'"], ("nf4", "lora")),
    ],
)
def test_methods_are_named_with_commas_between_them(flags, methods, capsys):
    code, out, _ = run(capsys, "train", f"--config={QUICKSTART}", *(f"--config.methods={value}" for value in flags), "--help")
    shown = next(line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  methods "))
    assert (code, ast.literal_eval(shown)) == (0, methods)


def test_a_config_that_says_methods_as_text_is_the_one_that_says_them_one_by_one():
    text, names = configs.load(QUICKSTART), configs.load(QUICKSTART)
    text.methods, names.methods = "nf4, lora", ("nf4", "lora")
    stored = [configs.as_json(build.resolved(config)) for config in (text, names)]
    assert stored[0]["methods"] == ["nf4", "lora"] and configs.differences(*stored) == []
    text.sweep = "seed=0,1"
    assert [member.config.methods for member in members.read(text)] == [("nf4", "lora")] * 2
    with pytest.raises(TypeError, match="methods"):
        text.methods = 3


def test_differences_ignore_what_a_resumed_run_may_change():
    old = {"steps": 10, "seed": 0, "logging": {"every_steps": 1}, "lora": {"rank": 4}}
    assert configs.differences(old, {**old, "steps": 20, "logging": {"every_steps": 5}}) == []
    assert configs.differences(old, {**old, "lora": {"rank": 8}}) == ["lora.rank: 4 -> 8"]
    with pytest.raises(ValueError, match=r"lora.rank: 4 -> 8(.|\n)*--allow_config_change"):
        configs.check_unchanged(old, {**old, "lora": {"rank": 8}})
    configs.check_unchanged(old, {**old, "lora": {"rank": 8}}, allowed=True)
