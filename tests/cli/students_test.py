"""A student that answers prompts itself learns what its teacher would have said, and goes on bit for bit."""

import pathlib

import numpy as np
import pytest

from ftjax.cli import config as configs
from ftjax.cli import main, refusals, students
from ftjax.cli.stop import Stop
from tests.cli.online_test import reported
from tests.cli.train_test import assert_bitwise_equal, stored

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "distill_smollm2.py") + ":smoke"
OPTIONS = (
    "--config.student.on_policy=0.5",
    "--config.steps=10",
    "--config.model.layers=None",
    "--config.loss.nll_coef=0.0",
    "--config.teacher.divergence=reverse_kl",
    "--config.data.accumulation=1",
    "--config.data.batch_size=16",
    "--config.eval.every_steps=0",
    "--config.optimizer.learning_rate=0.01",
    "--config.checkpoint.every_steps=0",
    "--config.logging.tensorboard=False",
)


def config(**changes):
    found = configs.load(CONFIG)
    found.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return found


def test_a_share_of_the_steps_is_the_student_s_whatever_comes_after_them():
    found = config(student__on_policy=0.3, steps=4000)
    steps = students.own(found)
    assert np.mean(steps) == pytest.approx(0.3, abs=0.03)
    found.steps = 100
    np.testing.assert_array_equal(students.own(found), steps[:100])
    for share, mean in ((0.0, 0), (1.0, 1)):
        found.student.on_policy = share
        assert students.own(found).mean() == mean


def test_a_student_learns_from_what_it_writes_and_goes_on_bit_for_bit(compiled, tmp_path, monkeypatch, capsys):
    def train(name: str) -> pathlib.Path:
        workdir = tmp_path / name
        assert main.main(["train", f"--config={CONFIG}", f"--workdir={workdir}", f"--compile_cache={compiled}", *OPTIONS]) == 0
        return workdir

    whole, steps = train("whole"), students.own(config(student__on_policy=0.5, steps=10))
    assert "student and trainer agree about" in capsys.readouterr().out
    np.testing.assert_array_equal(reported(whole, "train/on_policy"), steps)
    assert 0 < steps.sum() < 10 and len(reported(whole, "train/length")) == steps.sum()
    by_origin = [np.asarray(reported(whole, "train/divergence"))[steps == mine] for mine in (True, False)]
    assert all(found[-1] < found[0] for found in by_origin)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "at", lambda self, done: setattr(self, "reason", "SIGTERM") or done == 5)
        train("parts")
    assert_bitwise_equal(stored(train("parts")), stored(whole))
    assert reported(tmp_path / "parts", "train/divergence") == reported(whole, "train/divergence")


def test_a_student_that_is_not_what_is_trained_is_refused(compiled, sampled, tmp_path, capsys):
    sampled(scale=1.1, of=students)
    assert main.main(["train", f"--config={CONFIG}", f"--workdir={tmp_path}", f"--compile_cache={compiled}", *OPTIONS]) == 1
    assert "the sampler and the trainer disagree" in capsys.readouterr().err


WRONG = {
    ("student__on_policy", 1.5): r"student\.on_policy: the share of the steps is in \[0, 1\], not 1\.5",
    ("teacher__file", "said"): r"student\.on_policy: .* leave teacher\.file empty",
    ("sweep", "seed=0,1"): r"student\.on_policy: members of a sweep would each write their own",
    ("student__temperature", 0.0): r"student\.temperature: above 0, not 0",
    ("student__max_tokens", 128): r"student\.max_tokens: from 1 to less than data\.max_tokens=128, not 128",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_student_that_cannot_write_is_refused_before_anything_is_loaded(field):
    with pytest.raises(ValueError, match=WRONG[field]):
        refusals.check_student(config(**{"student__on_policy": 0.5, **dict([field])}))
    if field[0] != "student__on_policy":
        refusals.check_student(config(**dict([field])))


def test_a_teacher_with_other_tokens_cannot_judge_what_is_written(monkeypatch):
    lessons = type("Lessons", (), {"loader": type("Loader", (), {"heard": object()})})
    run = type("Run", (), {"config": config(student__on_policy=0.5)})
    with pytest.raises(ValueError, match=r"student\.on_policy: the teacher has tokens of its own"):
        students.Students(run, None, lessons, start=0, meter=None)
