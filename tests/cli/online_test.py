"""`ftjax train` on rollouts: it learns, tells what it did, and goes on bit for bit."""

import dataclasses
import json
import math
import pathlib
import time

import jax
import numpy as np
import pytest

from ftjax import rewards
from ftjax.checkpoint import Checkpoints
from ftjax.cli import main, online
from ftjax.cli.stop import Stop
from ftjax.logs.writers import read_jsonl
from tests.cli.reports import reported
from tests.cli.train_test import assert_bitwise_equal, stored

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "grpo_smollm2_sums.py") + ":smoke"
OPTIONS = (
    "--config.steps=16",
    "--config.data.batch_size=16",
    "--config.rollout.samples_per_prompt=8",
    "--config.rollout.minibatches=2",
    "--config.loss.kl_coef=0.01",
    "--config.methods=full",
    "--config.optimizer.learning_rate=0.01",
    "--config.eval.every_steps=8",
    "--config.eval.generate.examples=0",
    "--config.checkpoint.every_steps=0",
    "--config.logging.every_steps=2",
    "--config.logging.tensorboard=False",
)


FEW = ("--config.eval.every_steps=0", "--config.steps=2", "--config.rollout.show=0")


def high_bytes(prompts, completions, *, completion_ids, **columns):
    """The share of bytes from 128 on: half at random."""
    return [float(np.mean(np.asarray(ids) >= 128)) for ids in completion_ids]


@pytest.fixture(scope="module")
def train(compiled):
    """`train(workdir, *more) -> exit code`."""

    def run(workdir, *more: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            if rewards.REWARDS["numeric_match"] is rewards.numeric_match:
                patch.setitem(rewards.REWARDS, "numeric_match", high_bytes)
            return main.main(["train", f"--config={CONFIG}", f"--workdir={workdir}", f"--compile_cache={compiled}", *OPTIONS, *more])

    return run


def test_the_reward_rises(whole):
    rewards = reported(whole, "train/reward")
    assert len(rewards) == 8 and rewards[0] < 0.65 and rewards[-1] > rewards[0] + 0.2
    assert reported(whole, "eval/reward")[-1] > reported(whole, "eval/reward")[0]


def test_samples_learn_the_same_in_one_row_with_their_prompt(train, tmp_path):
    found = []
    for packing in ("none", "shared"):
        options = ("--config.rollout.minibatches=1", "--config.mesh.data=1", f"--config.data.packing={packing}")
        assert train(tmp_path / packing, *FEW, *options) == 0
        found.append([reported(tmp_path / packing, f"train/{name}") for name in ("loss", "grad_norm", "kl", "reward")])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-6)
    assert found[0][1][0] > 1e-3


def test_the_divergence_is_reported_where_it_is_asked_for_and_changes_nothing(train, tmp_path, capsys):
    """And where nothing asks for it, the run says so once."""
    for name, asked in (("without", False), ("with", True)):
        options = ("--config.loss.kl_coef=0.0", f"--config.rollout.report_kl={asked}", "--config.steps=4", "--config.logging.every_steps=1")
        assert train(tmp_path / name, *FEW, *options) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("the divergence from the start is not watched; rollout.report_kl=True watches it") == (not asked)
    assert not reported(tmp_path / "without", "train/kl") and reported(tmp_path / "with", "train/kl")[-1] > 0
    for name in ("loss", "grad_norm", "reward"):  # another program, which may round differently
        found = [reported(tmp_path / run, f"train/{name}") for run in ("without", "with")]
        np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-6)


def test_a_reward_for_one_byte_over_and_over_is_called_hacked(train, tmp_path, monkeypatch, capsys):
    """Once for each pattern, on the terminal and where the metrics go, at the first report that shows it."""

    def commonest(prompts, completions, *, completion_ids, **columns):
        return [float(np.unique(ids, return_counts=True)[1].max()) / 8 for ids in completion_ids]

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", commonest)
    more = ("--config.steps=32", "--config.optimizer.learning_rate=0.05", "--config.optimizer.warmup_steps=0")
    assert train(tmp_path, *FEW, *more) == 0
    said, rows = " ".join(capsys.readouterr().out.split()), read_jsonl(tmp_path / "metrics.jsonl")
    first, *reports = [row for row in rows if "train/reward" in row]
    hacked = {
        "repetition": [row["step"] for row in reports if row["train/repetition"] > max(0.25, 2 * first["train/repetition"])],
        "entropy collapse": [row["step"] for row in reports if row["train/entropy"] < 0.2 * first["train/entropy"]],
    }
    for name, steps in hacked.items():
        ((step, text),) = [(row["step"], row[field]) for row in rows if (field := f"advice/{name.replace(' ', '_')}") in row]
        assert step == steps[0] and said.count(f"{name}: {text}") == 1


def test_what_is_reported_says_all_that_may_go_wrong(whole):
    row = next(row for row in read_jsonl(whole / "metrics.jsonl") if "train/reward" in row)
    names = "reward_std rewards/numeric_match zero_variance length finished repetition kl entropy clip/high ratio sampler_gap"
    assert {
        f"train/{name}" for name in (*names.split(), "sampled_tokens_per_second", "sampling_seconds", "tokens_per_second")
    } <= row.keys()
    assert row["train/ratio"] == pytest.approx(1, abs=0.05) and row["train/sampler_gap"] < 1e-5 and row["train/length"] <= 8


def test_each_sample_is_a_line_with_its_rewards_and_advantage(whole):
    rows = read_jsonl(whole / "rollouts.jsonl")
    assert [row["step"] for row in rows[::32]] == list(range(1, 17, 2)) and len(rows) == 8 * 32
    for group in np.array_split(np.array([[row["reward"], row["advantage"]] for row in rows]), len(rows) // 8):
        assert group[:, 1].sum() == pytest.approx(0, abs=1e-4)
        assert np.std(group[:, 0]) == 0 or np.corrcoef(group.T)[0, 1] > 0.999
    assert rows[0]["rewards"] == {"numeric_match": rows[0]["reward"]} and "?" in rows[0]["prompt"]
    assert [row["prompt"] for row in rows[:8]] == [rows[0]["prompt"]] * 8 and rows[8]["prompt"] != rows[0]["prompt"]


@pytest.mark.parametrize("at", [3])
def test_a_stopped_run_goes_on_bit_for_bit(at, train, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "at", lambda self, experience: setattr(self, "reason", "SIGTERM") or experience == at)
        assert train(tmp_path) == 0
    assert f"saved at step {2 * at} of 16" in capsys.readouterr().out
    assert train(tmp_path) == 0 and Checkpoints(tmp_path / "checkpoints").steps()[-1] == 16
    assert_bitwise_equal(stored(tmp_path), stored(whole))
    assert read_jsonl(tmp_path / "rollouts.jsonl") == read_jsonl(whole / "rollouts.jsonl")
    assert reported(tmp_path, "train/reward") == reported(whole, "train/reward")


BFLOAT16 = "--config.model.dtype=bfloat16"


@pytest.mark.parametrize(
    "more", ["rollout.log=0", "rollout.mask_truncated=True", "model.dtype=bfloat16", "rollout.top_p=0.9", "rollout.min_tokens=2"]
)
def test_a_sampler_that_is_not_the_trainer_is_refused(more, train, sampled, tmp_path, capsys):
    sampled(lambda _, one: dataclasses.replace(one, reason="length"), scale=1.1)
    assert train(tmp_path, *FEW, f"--config.{more}") == 1
    err = capsys.readouterr().err
    assert "the sampler and the trainer disagree" in err and not Checkpoints(tmp_path / "checkpoints").steps()


def test_a_sampler_that_is_the_trainer_in_bfloat16_is_not(train, tmp_path, capsys):
    assert train(tmp_path, *FEW, BFLOAT16) == 0
    assert "sampler and trainer agree" in " ".join(capsys.readouterr().out.split())
    assert max(reported(tmp_path, "train/sampler_gap")) > 1e-5  # it does round


def test_a_sample_without_a_reward_teaches_nothing_whatever_else_the_loss_has(train, tmp_path, monkeypatch, capsys):
    """An entropy bonus would pull at it."""
    asked = []

    def later(prompts, completions, **columns):
        asked.append(len(prompts))
        return ([None] if len(asked) == 1 else [float(len(one)) for one in completions][:1]) * len(prompts)

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", later)
    assert train(tmp_path, *FEW, "--config.steps=4", "--config.methods=lora") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "step 2 taught nothing: no token of its batch counts" in out and "step 3 taught nothing" not in out


def test_groups_teach_by_what_their_samples_are_worth_to_the_one_that_learns(train, sampled, tmp_path, monkeypatch):
    """All are right, every second one was cut and pays: no other prompts are asked for, and the advantages are of what is left."""
    monkeypatch.setitem(rewards.REWARDS, "numeric_match", lambda prompts, completions, **columns: [30.0] * len(prompts))
    asked = sampled(lambda number, one: dataclasses.replace(one, reason="length" if number % 2 else "eos"))
    more = ("--config.rollout.dynamic_rounds=1", "--config.rollout.unfinished_penalty=0.5", "--config.rollout.reward_bounds=(-2.0, 2.0)")
    assert train(tmp_path, *FEW, *more, "--config.logging.every_steps=1") == 0
    assert asked == [4] and reported(tmp_path, "train/zero_variance")[0] == 0
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    assert {(row["finished"], row["rewards"]["numeric_match"], row["reward"]) for row in rows} == {(True, 30, 2), (False, 30, 1.5)}
    deviation = np.std([2, 1.5] * 4, ddof=1) + 1e-4
    np.testing.assert_allclose([row["advantage"] for row in rows], [0.25 / deviation, -0.25 / deviation] * 16, rtol=1e-5)


def test_the_ratio_of_the_first_step_on_an_experience_is_exactly_1(train, tmp_path, monkeypatch):
    """However the program that scores an experience as a whole rounds: here by 5e-5 nats a token."""
    scorer = online.rollouts.scorer

    def rounding(*arguments, **options):
        score = scorer(*arguments, **options)
        return lambda *given: dataclasses.replace(found := score(*given), logps=found.logps + 5e-5)

    monkeypatch.setattr(online.rollouts, "scorer", rounding)
    assert train(tmp_path, *FEW, "--config.logging.every_steps=1") == 0
    names = ("ratio", "ratio/min", "ratio/max", "kl/old", "clip/low", "clip/high")
    first, second = zip(*(reported(tmp_path, f"train/{name}") for name in names), strict=True)
    assert first == (1, 1, 1, 0, 0, 0) and second[1] < 1 < second[2]


def test_what_one_pass_over_an_experience_says_is_what_a_step_says_but_for_rounding(train, tmp_path):
    """In float32, where nothing has moved: at the second step π_old is from the scoring program, and π from that of the step."""
    more = ("--config.optimizer.learning_rate=0.0", "--config.rollout.epochs=2", "--config.data.accumulation=2", "--config.steps=4")
    assert train(tmp_path, *FEW, *more, "--config.logging.every_steps=1") == 0
    for name in ("ratio/min", "ratio/max"):
        np.testing.assert_allclose(reported(tmp_path, f"train/{name}"), 1, rtol=0, atol=1e-5)


def test_the_estimator_of_the_config_is_what_is_taken_from_rewards(train, tmp_path, monkeypatch):
    seen, divergence = [], online.rollouts.divergence
    monkeypatch.setattr(online.rollouts, "divergence", lambda config: lambda x: seen.append(np.float64(x)) or divergence(config)(x))
    more = ("--config.rollout.kl_penalty=0.05", "--config.rollout.kl_estimator=k3", "--config.steps=4", "--config.logging.every_steps=2")
    assert train(tmp_path, *FEW, *more) == 0
    wanted = [(np.exp(-x) - 1 + x).sum(axis=1).mean() for x in seen]
    np.testing.assert_allclose(reported(tmp_path, "train/kl/sampled"), wanted, rtol=1e-3, atol=1e-6)
    assert wanted[1] > 1e-3 and abs(wanted[1] / seen[1].sum(axis=1).mean() - 1) > 0.1


def test_samples_end_at_a_text_and_not_before_min_tokens(train, tmp_path, capsys):
    ends = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert train(tmp_path, *FEW, "--config.rollout.min_tokens=3", f"--config.rollout.stop={ends}") == 0
    assert "sampler and trainer agree" in " ".join(capsys.readouterr().out.split())
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    assert min(row["length"] for row in rows) == 3 and {row["finished"] for row in rows} == {True, False}
    assert not any(set(ends) & set(row["completion"][2:]) for row in rows)  # a letter before ends nothing
    assert any(set(ends) & set(row["completion"][:2]) for row in rows)


def test_a_reward_that_fails_ends_the_run_by_name_or_is_left_out(train, tmp_path, monkeypatch, capsys):
    def broken(prompts, completions, **columns):
        if "smallest" in " ".join(prompts):
            raise OSError("no such judge")
        return high_bytes(prompts, completions, **columns)

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", broken)
    assert train(tmp_path / "strict", *FEW) == 1
    assert "'numeric_match' raised OSError: no such judge (row" in (err := capsys.readouterr().err) and "judging.on_error='skip'" in err
    assert train(tmp_path / "lenient", *FEW, "--config.judging.on_error=skip", "--config.rollout.dynamic_rounds=1") == 0
    assert "not judged: reward 'numeric_match' raised OSError" in capsys.readouterr().out.replace("\n", " ")
    rows = read_jsonl(tmp_path / "lenient" / "rollouts.jsonl")
    assert {("smallest" in row["prompt"], row["reward"] is None) for row in rows} == {(True, True), (False, False)}
    assert all(row["advantage"] == 0 for row in rows if row["reward"] is None) and any(row["advantage"] for row in rows)


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (lambda number: time.sleep(0.3), "did not return within 0.1 s"),
        (lambda number: [0.0] * (number - 1), "returned 31 scores for 32 completions"),
        (lambda number: [math.nan] * number, "nan"),
    ],
    ids=["hangs", "wrong length", "not a number"],
)
def test_a_reward_that_hangs_or_gives_no_number_is_named_with_its_prompt(failing, said, train, tmp_path, monkeypatch, capsys):
    def broken(prompts, completions, **columns):
        high = high_bytes(prompts, completions, **columns)
        return (failing(len(prompts)) or high) if "smallest" in " ".join(prompts) else high

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", broken)
    assert train(tmp_path, *FEW, "--config.judging.timeout=0.1") == 1
    err = capsys.readouterr().err
    assert "'numeric_match'" in err and said in err and "smallest" in err, err


def test_ppo_learns_values_beside_the_policy(train, tmp_path):
    methods = ("--config.methods=value_head",)  # beside the one of OPTIONS
    more = (
        "--config.algorithm=ppo",
        "--config.rollout.epochs=2",
        "--config.rollout.kl_penalty=0.05",
        "--config.optimizer.learning_rate=0.002",
    )
    assert (
        train(
            tmp_path, *FEW, *methods, *more, "--config.steps=8", "--config.rollout.samples_per_prompt=1", "--config.logging.every_steps=4"
        )
        == 0
    )
    errors, ratios = reported(tmp_path, "train/value/error"), reported(tmp_path, "train/ratio")
    assert errors[1] < errors[0] and ratios[0] == pytest.approx(1, abs=0.05) and ratios[0] != 1
    assert reported(tmp_path, "train/kl")[1] > 0 and reported(tmp_path, "train/clip/value")


@pytest.mark.parametrize("judged", ["as it is", "within bounds", "not"])
def test_remax_compares_with_the_most_likely_answer(judged, train, tmp_path, monkeypatch):
    """Which is one byte over and over, below 128, and therefore worth 1, or a bound; where it has no reward, its prompt teaches nothing."""

    def low_bytes(*given, completion_ids, **columns):
        found = [1 - x for x in high_bytes(*given, completion_ids=completion_ids)]
        return [None if judged == "not" and len(set(ids)) == 1 else x for ids, x in zip(completion_ids, found, strict=True)]

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", low_bytes)
    more = ("--config.rollout.reward_bounds=(0.0, 0.75)",) if judged == "within bounds" else ()
    assert train(tmp_path, *FEW, "--config.algorithm=remax", "--config.rollout.samples_per_prompt=2", *more) == 0
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    if judged == "not":
        assert not any(row["advantage"] for row in rows) and any(row["reward"] for row in rows)
    else:
        np.testing.assert_allclose([row["reward"] - row["advantage"] for row in rows], 0.75 if more else 1.0, atol=1e-5)


TWO_REWARDS = """
from configs import grpo_smollm2_sums

def get_config(arg=""):
    config = grpo_smollm2_sums.get_config(arg)
    with config.unlocked():
        config.rewards.repetition = {"weight": 0.5, "ngram_tokens": 1}
    config.rollout.advantages = "decoupled"
    return config
"""


def test_advantages_of_several_rewards_may_be_decoupled(compiled, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "numeric_match", high_bytes)
    (tmp_path / "config.py").write_text(TWO_REWARDS)
    common = ("train", f"--config={tmp_path}/config.py:smoke", f"--workdir={tmp_path}/run", f"--compile_cache={compiled}")
    assert main.main([*common, *OPTIONS, *FEW]) == 0
    lines = read_jsonl(tmp_path / "run" / "rollouts.jsonl")[:32]
    each = [np.reshape([line["rewards"][name] for line in lines], (4, 8)) for name in ("numeric_match", "repetition")]
    alone = [(x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-4) for x in each]
    total = alone[0] + 0.5 * alone[1]
    found = np.reshape([line["advantage"] for line in lines], (4, 8))
    np.testing.assert_allclose(found, (total - total.mean()) / (total.std(ddof=1) + 1e-4), atol=1e-4)


ONLINE_DPO = """
from configs import base

def get_config(arg=""):
    config = base.online("dpo", beta=0.1)
    config.steps = 8
    config.data.sources.tasks = config.data.eval_sources.tasks = base.source("tasks:compare", split="train[:64]")
    config.data.update({"max_tokens": 128, "batch_size": 4})
    config.model.update({"preset": "tiny-llama", "random": True, "dtype": "float32"})
    config.tokenizer, config.methods = "bytes", ("full",)
    config.rewards.numeric_match = {"weight": 2.0}
    config.rollout.update({"max_tokens": 8, "samples_per_prompt": 4, "show": 1})
    config.optimizer.update({"learning_rate": 0.003, "warmup_steps": 0})
    config.eval.update({"every_steps": 8, "batches": 1})
    config.checkpoint.every_steps, config.logging.every_steps, config.logging.tensorboard = 0, 4, False
    config.mesh.data = 1
    return config.lock()
"""


def test_online_dpo_learns_from_the_best_and_the_worst_sample(compiled, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "numeric_match", high_bytes)
    (tmp_path / "online_dpo.py").write_text(ONLINE_DPO)
    assert main.main(["train", f"--config={tmp_path / 'online_dpo.py'}", f"--workdir={tmp_path}", f"--compile_cache={compiled}"]) == 0
    margins, accuracies = reported(tmp_path, "train/rewards/margin"), reported(tmp_path, "train/rewards/accuracy")
    assert abs(margins[0]) < margins[1] and accuracies[1] > 0.5
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    assert len(rows) == 8 * 4 * 4 and all(row["reward"] == pytest.approx(2 * row["rewards"]["numeric_match"], abs=1e-5) for row in rows)
    assert reported(tmp_path, "eval/reward") and reported(tmp_path, "train/reward_std")[0] > 0


def test_policy_and_reference_are_asked_at_the_temperature_that_samples(compiled, tmp_path, monkeypatch):
    """So that at first, when they are the same, nothing is taken from any reward."""
    monkeypatch.setitem(rewards.REWARDS, "numeric_match", high_bytes)
    (tmp_path / "online_dpo.py").write_text(ONLINE_DPO)
    more = ("--config.rollout.kl_penalty=0.1", "--config.rollout.temperature=0.5", "--config.steps=1", "--config.eval.every_steps=0")
    arguments = [f"--config={tmp_path / 'online_dpo.py'}", f"--workdir={tmp_path}", f"--compile_cache={compiled}"]
    assert main.main(["train", *arguments, *more]) == 0
    assert abs(reported(tmp_path, "train/kl/sampled")[0]) < 1e-5


UNEVEN = """
from configs import base

def get_config(arg=""):
    config = base.online(arg)
    config.data.sources.mine = base.source("FOLDER/prompts.jsonl")
    config.data.update({"max_tokens": 128, "batch_size": 8, "template": "none"})
    config.model.update({"preset": "tiny-llama", "random": True, "dtype": "float32"})
    config.tokenizer, config.methods = "bytes", ("lora", "value_head") if arg == "ppo" else ("lora",)
    config.rewards.numeric_match = 1.0
    config.rollout.update({"max_tokens": 8, "samples_per_prompt": 4, "minibatches": 2, "show": 0})
    config.rollout.stop = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    config.steps, config.rollout.kl_penalty = 12, 0.05
    config.eval.every_steps = config.checkpoint.every_steps = 0
    config.logging.every_steps, config.logging.tensorboard = 2, False
    config.mesh.data = 1
    return config.lock()
"""


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_after_the_second_experience_nothing_is_compiled_whatever_the_lengths(algorithm, compiled, tmp_path, monkeypatch, caplog):
    """Of six; the longest of each has rows of 96 columns, as `rollout.bucket` has it: three prompts in four are near that."""
    rows = [{"prompt": "x" * (70 + n % 7 if n % 4 else 20 + n), "completion": "?"} for n in range(32)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "uneven.py").write_text(UNEVEN.replace("FOLDER", str(tmp_path)))
    before = []

    def counting(*given, **columns):
        before.append(len(compilations()))
        return high_bytes(*given, **columns)

    def compilations():
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]

    monkeypatch.setitem(rewards.REWARDS, "numeric_match", counting)
    arguments = [f"--config={tmp_path / 'uneven.py'}:{algorithm}", f"--workdir={tmp_path}", f"--compile_cache={compiled}"]
    with jax.log_compiles():
        assert main.main(["train", *arguments]) == 0
    assert len(before) == 6 and before[0] > 5
    assert compilations()[before[2] : before[-1]] == []
    lengths = {(row["step"], len(row["prompt"]), row["length"]) for row in read_jsonl(tmp_path / "rollouts.jsonl")}
    assert len({length for _, _, length in lengths}) > 4 and len({prompt for step, prompt, _ in lengths if step > 4}) > 6
