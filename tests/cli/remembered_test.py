"""What an objective remembers from step to step is stored with the state, and a run that goes on has it."""

import pathlib

import numpy as np
import pytest
from etils import epath

from ftjax import tree
from ftjax.checkpoint import Checkpoints
from ftjax.cli import abstract, build, export, footprint, main
from ftjax.cli import config as configs
from ftjax.cli.stop import Stop
from ftjax.logs.writers import read_jsonl
from tests.cli.train_test import assert_bitwise_equal, stored

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "dpo_smollm2_hh.py") + ":smoke"
pytestmark = pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")


@pytest.fixture(scope="module")
def command(compiled):
    """`command(workdir, *more)`: five steps of DPO, each of which leaves a checkpoint."""
    fixed = ["train", f"--config={CONFIG}", f"--compile_cache={compiled}", "--config.steps=5", "--config.eval.every_steps=0"]
    fixed += ["--config.checkpoint.every_steps=1", "--config.checkpoint.keep=9", "--config.logging.tensorboard=False"]
    fixed += ["--config.optimizer.learning_rate=0.01"]
    return lambda workdir, *more: [*fixed, f"--workdir={workdir}", *more]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run whose reference follows by halves every second step."""
    workdir = tmp_path_factory.mktemp("whole")
    assert main.main(command(workdir, *FOLLOWS)) == 0
    return workdir


FOLLOWS = ("--config.reference.every_steps=2", "--config.reference.alpha=0.5")


def branch(arrays, name):
    return {path.split("]", 1)[1].removeprefix("['reference']"): x for path, x in arrays.items() if path.startswith(f"['{name}']")}


def test_the_reference_is_a_mean_of_the_policies_that_it_met(whole):
    policy = {step: branch(stored(whole, step), "trainable") for step in (1, 2, 4, 5)}
    reference = {step: branch(stored(whole, step), "carried") for step in (1, 2, 3, 4, 5)}
    assert policy[1].keys() == reference[1].keys() and len(policy[1]) > 3
    moved = 0
    for path, start in reference[1].items():
        second = 0.5 * policy[2][path] + 0.5 * start
        np.testing.assert_allclose(reference[2][path], second, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(reference[3][path], reference[2][path])
        np.testing.assert_allclose(reference[4][path], 0.5 * policy[4][path] + 0.5 * second, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(reference[5][path], reference[4][path])
        moved = max(moved, np.abs(reference[4][path] - start).max())
    assert moved > 1e-3


def test_a_reference_that_moves_goes_on_bit_for_bit(whole, command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def stop(self, step):
            self.reason = "SIGTERM" if step == 3 else None
            return step == 3

        patch.setattr(Stop, "at", stop)
        assert main.main(command(tmp_path, *FOLLOWS)) == 0
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 3
    assert main.main(command(tmp_path, *FOLLOWS)) == 0
    assert_bitwise_equal(stored(tmp_path), stored(whole))


def test_a_checkpoint_with_a_reference_is_exported_as_its_policy(whole):
    found = tree.flatten(export.trained(epath.Path(whole), "4").params)
    lora = found["layers/self_attn/q_proj/kernel"]
    policy = branch(stored(whole, 4), "trainable")
    expected = [x for path, x in policy.items() if "q_proj" in path]
    assert len(expected) == 2
    for one, other in zip(sorted(expected, key=np.shape), sorted((lora.a, lora.b), key=np.shape), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_plan_counts_the_reference_that_follows():
    config = configs.load(CONFIG)
    config.methods = ("full",)
    mesh, held = build.mesh(config), []
    for config.reference.every_steps in (2, 0):
        built = abstract.built(config, mesh)
        held.append(footprint.of(config, mesh, "cpu", built))
    moments, trained = held[0].optimizer - held[1].optimizer, footprint.device_bytes(built.state.trainable)
    assert moments == trained > held[1].base / 2 and held[0].activations == held[1].activations


def test_a_running_mean_is_that_of_the_steps_before(command, tmp_path):
    more = ("--config.algorithm=bco", "--config.steps=3", "--config.checkpoint.every_steps=0")
    assert main.main(command(tmp_path, *more)) == 0
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/delta" in row]
    counted = [row["train/rewards"] for row in rows]
    assert [row["train/delta"] for row in rows][:2] == pytest.approx([0, counted[0]], rel=1e-4, abs=1e-8)
    assert rows[2]["train/delta"] != 0
    assert "['carried']['rewards']['rewards'].total" in "".join(stored(tmp_path)).replace("']['total']", "'].total")


def test_what_cannot_follow_says_so(command, tmp_path, capsys):
    for more, message in (
        (("--config.algorithm=simpo", FOLLOWS[0]), "follows the policy in objectives of pairs, and 'simpo' is none"),
        ((FOLLOWS[0], "--config.reference.logps=cached"), "set it to 'live'"),
        ((FOLLOWS[0], "--config.reference.alpha=0.0"), "above 0 and at most 1, not 0.0"),
        (("--config.algorithm=bco", "--sweep=seed=0,1", "--config.eval.every_steps=1"), "members cannot remember rewards"),
        (("--config.reference.logps=cached", "--sweep=seed=0,1", "--config.eval.every_steps=1"), "'cached' is not for a sweep"),
    ):
        assert main.main(command(tmp_path, *more)) == 1
        assert message in capsys.readouterr().err
