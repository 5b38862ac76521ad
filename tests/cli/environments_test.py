"""`ftjax train` with an environment or tools: episodes are played, judged and told, and a stopped run goes on bit for bit."""

import functools
import os
import pathlib

import pytest

from configs import base
from ftjax import data, rollout
from ftjax.checkpoint import Checkpoints
from ftjax.cli import config as configs
from ftjax.cli import environments, main, refusals
from ftjax.cli.stop import Stop
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.logs.writers import read_jsonl
from ftjax.rollout import Reply
from tests.cli.reports import reported
from tests.cli.train_test import assert_bitwise_equal, stored

SUMS = str(pathlib.Path(__file__).parents[2] / "configs" / "grpo_smollm2_sums.py")
CONFIG = """
from configs import base

def get_config(arg=""):
    config = base.online("grpo", kl_coef=0.01)
    config.steps = 4
    config.data.sources.tasks = config.data.eval_sources.tasks = base.source("tasks:compare", split="train[:64]")
    config.data.update({"max_tokens": 256, "batch_size": 8})
    config.model.update({"preset": "tiny-llama", "random": True, "dtype": "float32"})
    config.tokenizer, config.methods = "bytes", ("full",)
    config.rewards.environment = 2.0
    config.rollout.update({"max_tokens": 64, "samples_per_prompt": 4, "minibatches": 2, "show": 1})
    config.rollout.environment.update({"name": "tests.cli.environments_test:Game", "max_turns": 3})
    config.rollout.environment.stop = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")  # random bytes are one soon
    config.optimizer.update({"learning_rate": 0.01, "warmup_steps": 0})
    config.eval.update({"every_steps": 4, "batches": 1})
    config.checkpoint.every_steps, config.logging.every_steps, config.logging.tensorboard = 0, 2, False
    config.mesh.data = 1
    return config.lock()
"""


class Game:
    """Three turns, each worth 1 if it is short."""

    def reset(self, row):
        assert row["task"] == "compare" and row["answer"]
        self.turns = 0

    def step(self, completion):
        self.turns += 1
        return Reply(f"{self.turns}!", float(len(completion) < 5), self.turns == 3)


class Failing(Game):
    def step(self, completion):
        if len(completion) % 2:
            raise OSError("the world ended")
        return super().step(completion)


@pytest.fixture(scope="module")
def train(compiled, tmp_path_factory):
    """`train(workdir, *more) -> exit code`."""
    path = tmp_path_factory.mktemp("configs") / "game.py"
    path.write_text(CONFIG)
    return lambda workdir, *more: main.main(["train", f"--config={path}", f"--workdir={workdir}", f"--compile_cache={compiled}", *more])


def test_episodes_are_told_turn_by_turn_with_what_the_environment_gave(whole):
    rows = read_jsonl(whole / "rollouts.jsonl")
    assert len(rows) == 2 * 16
    for row in rows:
        turns = row["turns"]
        assert [turn["role"] for turn in turns] == ["assistant", "user"] * (len(turns) // 2)
        assert [turn["content"] for turn in turns[1::2]] == [f"{n}!" for n in range(1, len(turns) // 2 + 1)]
        assert row["reward"] == 2 * row["rewards"]["environment"] and row["rewards"]["environment"] <= len(turns) // 2
        assert row["finished"] <= (len(turns) == 6) and "\n[user] 1!" in row["completion"]
    assert {row["finished"] for row in rows} == {True, False}


def test_the_trainer_says_what_the_sampler_said_of_every_turn(whole):
    assert max(reported(whole, "train/sampler_gap")) < 1e-5
    assert 1 < reported(whole, "train/turns")[0] <= 3 and reported(whole, "eval/turns")
    lengths = [row["length"] for row in read_jsonl(whole / "rollouts.jsonl")][:16]
    assert reported(whole, "train/length")[0] == pytest.approx(sum(lengths) / 16, rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(train, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "at", lambda self, experience: setattr(self, "reason", "SIGTERM") or experience == 1)
        assert train(tmp_path) == 0
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 2
    assert train(tmp_path) == 0
    assert_bitwise_equal(stored(tmp_path), stored(whole))
    assert read_jsonl(tmp_path / "rollouts.jsonl") == read_jsonl(whole / "rollouts.jsonl")


def test_episodes_may_be_played_ahead(compiled, tmp_path):
    path = tmp_path / "lagging.py"
    path.write_text(CONFIG.replace("kl_coef=0.01", 'kl_coef=0.01, correction="token_truncate"'))
    more = ("--config.rollout.staleness=1", "--config.eval.every_steps=0")
    assert main.main(["train", f"--config={path}", f"--workdir={tmp_path}", f"--compile_cache={compiled}", *more]) == 0
    assert reported(tmp_path, "train/staleness") == [0, 1] and max(reported(tmp_path, "train/behavior/weight")) != 1


def test_an_environment_that_fails_ends_the_run_by_name_or_the_episode(train, tmp_path, capsys):
    more = ("--config.steps=2", "--config.eval.every_steps=0", "--config.rollout.environment.name=tests.cli.environments_test:Failing")
    assert train(tmp_path / "strict", *more) == 1
    err = capsys.readouterr().err.replace("\n", " ")
    assert "'environment' ended an episode by OSError: the world ended (row" in err and "judging.on_error='skip'" in err
    assert train(tmp_path / "lenient", *more, "--config.judging.on_error=skip") == 0
    assert "not judged: reward 'environment' ended an episode by OSError" in capsys.readouterr().out.replace("\n", " ")
    rows = read_jsonl(tmp_path / "lenient" / "rollouts.jsonl")
    failed = [row["turns"][-1]["role"] == "assistant" for row in rows]  # nothing came after it
    assert [row["reward"] is None for row in rows] == failed and {True, False} == set(failed)
    assert any(len(row["turns"]) > 1 for row, failure in zip(rows, failed, strict=True) if failure)
    assert not any(row["advantage"] for row, failure in zip(rows, failed, strict=True) if failure)
    assert not any(row["finished"] for row in rows if len(row["turns"]) < 6)


def config(**changes):
    found = configs.load(SUMS)
    found.update({"data": {"template": "auto"}, "eval": {"generate": {"examples": 0}}})
    with found.unlocked():
        found.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return found


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"name": "higher_lowr"}, "environment.name: there is no 'higher_lowr'; nearest: 'higher_lower'.*FILE.py:NAME"),
        ({"name": "no/such.py:Game"}, "there is no file 'no/such.py'"),
        ({"name": "no_such_module:Game"}, "No module named 'no_such_module'"),
        ({"name": "tests.cli.environments_test:Gme"}, "has no 'Gme'; nearest: 'Game'"),
        ({"tools": ("calclator",)}, "environment.tools: there is no 'calclator'; nearest: 'calculator'"),
        ({"tools": ("tests.cli.environments_test:config",)}, "tools: 'config' cannot be described"),
        ({"tools": ("calculator",), "parser": "hermess"}, "environment.parser: there is no 'hermess'; nearest: 'hermes'"),
        ({"name": "higher_lower", "tools": ("calculator",)}, "name either an environment or tools"),
        ({"name": "higher_lower", "max_turns": 0}, "max_turns: at least 1"),
        ({"tools": ("calculator",), "seconds": 0.0}, "seconds: above 0"),
    ],
)
def test_what_cannot_be_played_is_refused(changes, shown):
    with pytest.raises(ValueError, match=shown):
        refusals.check(config(**{f"rollout__environment__{name}": value for name, value in changes.items()}))


def test_what_does_not_go_with_turns_is_refused():
    tools = {"rollout__environment__tools": ("calculator",)}
    refusals.check(config(**tools))
    with pytest.raises(ValueError, match="answers of one turn"):
        refusals.check(config(**tools, eval__samples=2))
    with pytest.raises(ValueError, match="template: tools are shown .* choose 'chatml'"):
        refusals.check(config(**tools, data__template="none"))
    with pytest.raises(ValueError, match="rewards.environment: there is none"):
        refusals.check(config(rewards__environment=1.0))


READS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + data.CHATML


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("template", [READS, "auto"])
def test_tools_are_shown_by_the_template_or_in_a_system_message(template, system):
    found = config(rollout__environment__tools=("calculator",), data__template=template)
    encoder = data.make_encoder(byte_tokenizer(), max_tokens=2048, template=template)
    asked = ({"role": "user", "content": "2 + 3?"},)
    example = data.Example((({"role": "system", "content": "Be brief."},) if system else ()) + asked)
    shown = environments.opened(found, encoder)(example)
    text = byte_tokenizer().decode(encoder.prompt(shown))
    assert text.count('"name": "calculator"') == 1 and text.count("Be brief.") == system and text.count("2 + 3?") == 1
    assert (shown.tools is not None) == (template == READS) and ("<tool_call>" in text) == (template != READS)
    assert len(shown.messages) == 2 if system or template != READS else 1


def test_a_prompt_of_the_config_s_own_describes_the_tools():
    found = config(rollout__environment__tools=("calculator",), rollout__environment__prompt='Write {"name": …} for: {tools}')
    shown = environments.opened(found, data.make_encoder(byte_tokenizer(), max_tokens=2048))(
        data.Example(({"role": "user", "content": "?"},))
    )
    assert shown.messages[0]["content"].startswith('Write {"name": …} for: {"type": "function"')


def test_a_reset_that_fails_when_the_data_is_read_names_the_row():
    found = config(rollout__environment__name="higher_lower")
    example = data.Example(({"role": "user", "content": "?"},), columns={"answer": "x"}, where="numbers.jsonl:7")
    with pytest.raises(ValueError, match="reset failed on numbers.jsonl:7: ValueError: higher_lower: a row needs a whole number"):
        environments.opened(found, data.make_encoder(byte_tokenizer(), max_tokens=64))(example)


def test_what_tools_alone_have_is_refused_of_an_environment():
    assert environments._OF_TOOLS == {name: base.environment()[name] for name in environments._OF_TOOLS}
    with pytest.raises(
        ValueError, match="rollout.environment.seconds: 60.0 is read where there are tools.*leave it at 10.0.*judging.timeout"
    ):
        environments.check(config(rollout__environment__name="higher_lower", rollout__environment__seconds=60.0))


def test_a_file_of_one_s_own_is_found(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    assert environments.found(f"{tmp_path}/mine.py:Mine", rollout.ENVIRONMENTS, field="x").__name__ == "Mine"


def test_a_file_of_one_s_own_is_executed_once_and_may_have_dataclasses(tmp_path, capsys):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text = f"{head}print('executed')\n@dataclass\nclass Mine:\n    x: int = 1\n"
    (tmp_path / "mine.py").write_text(text)
    find = functools.partial(environments.found, f"{tmp_path}/mine.py:Mine", rollout.ENVIRONMENTS, field="x")
    assert find() is find() and find()().x == 1 and capsys.readouterr().out == "executed\n"
    (tmp_path / "mine.py").write_text(text.replace("1", "2"))
    os.utime(tmp_path / "mine.py", ns=(1, 1))  # a clock may be coarser than a test
    assert find()().x == 2


def test_a_template_that_shows_no_turns_is_refused_before_the_first_episode():
    hides = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    encoder = data.make_encoder(byte_tokenizer(), max_tokens=64, template=hides)
    with pytest.raises(ValueError, match="does not show a turn"):
        environments.sampler(config(rollout__environment__name="higher_lower"), None, encoder, rollout.settings(temperature=1.0))


def test_answers_of_one_turn_are_not_what_such_a_policy_is_measured_by(capsys):
    calculator = pathlib.Path(SUMS).with_name("grpo_smollm2_calculator.py")
    assert main.main(["eval", f"--config={calculator}:smoke"]) == 1
    assert "answers are of one turn" in capsys.readouterr().err
