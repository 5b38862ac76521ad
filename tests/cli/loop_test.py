"""The loop evaluates, saves and ends at the right steps, whatever asks it to."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from ftjax.cli import loop
from ftjax.types import Mean


class Run:
    """A run of six steps without a model: evaluated every third, saved at the end; `asked` says after which step to stop."""

    def __init__(self, *, asked: int | None = None, losses=(1.0, 0.5), patience: int = 0, every_steps: int = 4, stride: int = 1):
        self.asked, self.losses, self.patience, self.every_steps, self.stride = asked, list(losses), patience, every_steps, stride
        self.done, self.evaluated, self.saved, self.logged, self.memory = [], [], {}, {}, loop.Memory()
        self.algorithm, self.said, self.texts = "sft", [], []

    def origin(self, done):
        return {}

    def evaluate(self, state, step):
        self.evaluated.append(step)
        return {"loss": self.losses.pop(0)}

    def step(self, state, frozen, batch):
        self.done.append(state + 1)
        one, none = Mean(np.float32(1 / (state + 1)), np.float32(1)), Mean(np.float32(0), np.float32(1))
        return state + 1, {"loss": one, "grad_norm": one, "tokens": one, "skipped": none}

    def save(self, state, record):
        self.saved.setdefault(record.step, json.loads(json.dumps(record._asdict())))

    def log(self, step, values):
        self.logged |= {(step, name): value for name, value in values.items() if name.endswith("loss")}

    def go(self, start: int = 0) -> tuple[int, str]:
        quiet = dict.fromkeys(("start", "stop", "advance", "report", "say", "add", "restart", "wait"), lambda *args, **options: None)
        given = {
            "config": ConfigDict(
                {
                    "algorithm": self.algorithm,
                    "steps": 6,
                    "checkpoint": {"every_steps": 0, "best_metric": "loss"},
                    "early_stopping": {"patience": self.patience},
                    "logging": {"every_steps": self.every_steps},
                    "max_skipped_steps": 3,
                }
            ),
            "config_json": {},
            "step": self.step,
            "batch": lambda state, done: (SimpleNamespace(segment_ids=np.ones((1, 4))), self.origin(done)),
            "stored": lambda state: state,
            "stride": self.stride,
            "put": lambda batch: batch,
            "flops": lambda batch: 1.0,
            "parts": 1,
            "learning_rate": lambda step: 0.5,
            "evaluate": self.evaluate,
            "evaluate_every": 3,
            "checkpoints": SimpleNamespace(**quiet, save=self.save),
            "writers": SimpleNamespace(write=self.log, text=lambda *told: self.texts.append(told)),
            "terminal": SimpleNamespace(**quiet | {"say": lambda text, **options: self.said.append(text)}),
            "meter": SimpleNamespace(**quiet, read=dict),
            "stop": SimpleNamespace(reason="SIGINT", at=lambda step: step == self.asked),
            "memory": self.memory,
        }
        unused = dict.fromkeys(field.name for field in dataclasses.fields(loop.Loop))
        _, done, reason = loop.take_steps(loop.Loop(**{**unused, **given}), start, start=start)
        return done, reason

    def resume(self) -> tuple[int, str]:
        """Go on as the next process would: with what stands in the last checkpoint."""
        last = max(self.saved)
        self.asked, self.memory = None, loop.Memory(**self.saved[last]["memory"])
        return self.go(last)


@pytest.fixture
def whole():
    run = Run()
    assert run.go() == (6, loop.FINISHED)
    return run


@pytest.mark.parametrize("at", range(7))
def test_a_stop_changes_no_step_no_evaluation_and_no_number(at, whole):
    run = Run(asked=at)
    assert run.go() == (at, "SIGINT") and max(run.saved) == at
    assert run.resume() == (6, loop.FINISHED)
    assert run.done == [1, 2, 3, 4, 5, 6] and run.evaluated == whole.evaluated == [3, 6]
    assert run.logged == whole.logged and run.logged[4, "train/loss"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_nothing_happens_in_the_middle_of_an_experience():
    run = Run(asked=1, stride=3)
    assert run.go() == (3, "SIGINT") and run.evaluated == list(run.saved) == [3]
    assert run.resume() == (6, loop.FINISHED) and run.done == [1, 2, 3, 4, 5, 6]


def test_what_is_said_of_a_batch_is_reported_with_its_step():
    run = Run(every_steps=2)
    told = {0: 4.0, 2: 8.0, 3: 2.0}
    run.origin = lambda done: {"sampled_loss": Mean(np.float32(told[done]), np.float32(1))} if done in told else {}
    run.go()
    assert [run.logged.get((step, "train/sampled_loss")) for step in (2, 4, 6)] == [4.0, 5.0, None]


@pytest.mark.parametrize("at", [3, 6])
def test_advice_is_said_and_written_once_though_the_run_was_stopped(at):
    """Eighty responses a step make a reading of two steps; a stop after step 3 leaves half of one. Steps 5 and 6 show a pattern."""
    run = Run(every_steps=1)
    run.algorithm, run.asked = "dpo", at
    share = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3}  # of the first four steps, then nine in ten
    run.origin = lambda done: {"saturated": Mean(np.float32(80 * share.get(done, 0.9)), np.float32(80))}
    run.go()
    if at < 6:
        assert run.texts == []
        run.resume()
    assert [(step, name) for step, name, _ in run.texts] == [(6, "advice/saturation")] and "90% of the responses" in run.texts[0][2]
    assert [text for text in run.said if "saturation" in text] == [f"[yellow]saturation[/]: {run.texts[0][2]}"]


def test_the_evaluation_of_the_step_of_a_stop_stands_in_its_checkpoint():
    run = Run(asked=3)
    run.go()
    assert run.saved[3]["metrics"] == {"loss": 1.0}


def test_a_run_that_ended_early_saved_its_last_step_and_does_no_more():
    run = Run(losses=(1.0, 2.0), patience=1)
    assert run.go() == (6, loop.EARLY)
    run = Run(losses=(float("nan"),), patience=1)
    assert run.go() == (3, loop.EARLY) and list(run.saved) == [3]
    assert run.resume() == (3, loop.EARLY) and run.done == [1, 2, 3] and run.evaluated == [3]
