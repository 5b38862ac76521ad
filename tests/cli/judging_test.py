"""The rewards of a config judge what they are shown, by their weights."""

import dataclasses
import json
import pathlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base as configurations
from ftjax import data, rewards, rollout
from ftjax.cli import config as configs
from ftjax.cli import grader, judging, panel, runtime
from ftjax.hf.tokenizer import byte_tokenizer
from tests.cli.rollouts_test import CONFIG

SAMPLES = [rollout.Sample(*[np.arange(n)] * 3, "eos") for n in (1, 4)]


def prompt(*messages: str, **row) -> data.Prompt:
    roles = ("user", "assistant") * 2
    said = tuple({"role": role, "content": content} for role, content in zip(roles, messages, strict=False))
    return data.Prompt(np.arange(3), data.Example(said, columns=row))


def judge(blocks, **options):
    config = configs.load(CONFIG)
    with config.unlocked():
        config.rewards = blocks
    return judging.judge(config, **options)


def test_rewards_see_the_answer_the_columns_and_the_tokens_and_are_weighed():
    panel = judge({"numeric_match": 2.0, "target_length": {"weight": 0.5, "target_tokens": 4}})
    judged = panel([prompt("1 + 1?", "2", level=1), prompt("2 + 1?", answer="3")], ["It is 2", "4"], SAMPLES)
    total, each = judging.as_rows(judged, (1, 2))
    np.testing.assert_allclose(each["numeric_match"], [[1, 0]])
    np.testing.assert_allclose(each["target_length"], [[-0.75, 0]])
    np.testing.assert_allclose(total, [[2 - 0.375, 0]])


def test_a_trained_reward_model_is_loaded_from_its_folder_and_shown_the_conversation():
    seen = []

    def load(folder):
        return lambda prompts, texts: [seen.append((folder, prompt, text)) or 0.5 for prompt, text in zip(prompts, texts, strict=True)]

    panel = judge({"reward_model": {"folder": "runs/reward", "clip": 0.25}}, load={"reward_model": load})
    judged = panel([prompt("Hello"), prompt("Hello", "Yes?", "Who?", "I.")], ["Hi", "Me"], SAMPLES)
    assert judged.rewards.tolist() == [0.25, 0.25]
    assert seen[0] == ("runs/reward", "Hello", "Hi") and [message["content"] for message in seen[1][1]] == ["Hello", "Yes?", "Who?"]
    assert judge({"reward_model": {"folder": "runs/reward"}})  # whose options alone are looked at


def test_chats_are_shown_to_rewards_as_trl_shows_them():
    """The reward of a chat in TRL's documentation reads `completion[0]["content"]`."""
    config, seen = configs.load(CONFIG), []

    def by_length(prompts, completions, **columns):
        seen.extend(prompts)
        return [float(len(completion[0]["content"])) for completion in completions]

    with config.unlocked():
        config.rewards = {"length": {"reward": by_length}}
        config.judging.messages = True
    judged = judging.judge(config)([prompt("Hello"), prompt("Hello", "Yes?", "Who?", "I.")], ["Hi", "Me, too"], SAMPLES)
    assert judged.rewards.tolist() == [2, 7]
    roles = [[message["role"] for message in asked] for asked in seen]
    assert roles == [["user"], ["user", "assistant", "user"]]
    with config.unlocked():
        config.rewards = {"numeric_match": 1.0, "repetition": {"ngram_tokens": 1}, "think_format": 1.0}
    assert judging.judge(config)([prompt("1 + 1?", "2")], ["It is 2"], SAMPLES[:1]).scores["numeric_match"].tolist() == [1]


def test_a_column_that_none_of_these_rows_has_says_nothing_of_them():
    """Of a mixture: others have it, which `check_columns` has seen."""
    panel = judge({"numeric_match": 1.0, "code": 1.0, "choice": 1.0})
    judged = panel([prompt("1 + 1?", "2"), prompt("?", answer=3)], ["2", "3"], SAMPLES)
    assert judged.scores["numeric_match"].tolist() == [1, 1] and np.isnan(judged.scores["code"]).all()
    assert judged.rewards.tolist() == [1, 1]


OWN = """
def short(completions, *, limit=3, **columns):
    return [float(len(completion) <= limit) for completion in completions]

def level(prompts, completions, *, level):
    return level

wanted = 3.0
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def test_a_reward_of_ones_own_and_one_reward_twice(own):
    blocks = {
        "brevity": {"reward": f"{own}:short", "weight": 2.0},
        "longer": {"reward": f"{own}:short", "limit": 6},
        "level": {"reward": f"{own}:level", "weight": 0.5},
        "near": {"reward": "target_length", "target_tokens": 1},
        "far": {"reward": "target_length", "target_tokens": 4},
        "right": {"reward": "tests.cli.judging_test:right"},
    }
    judged = judge(blocks)([prompt("1 + 1?", "2", level=4), prompt("?", answer="3", level=2)], ["It is 2", "4 no"], SAMPLES)
    assert {name: scores.tolist() for name, scores in judged.scores.items()} == {
        "brevity": [0, 0], "longer": [0, 1], "level": [4, 2], "near": [0, -1], "far": [-0.75, 0], "right": [1, 0],
    }  # fmt: skip
    assert judged.rewards.tolist() == [2 - 0.75 + 1, 1 + 1 - 1]


def test_the_example_of_the_page_is_a_config(tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "online.md").read_text(encoding="utf-8")
    function, named = re.findall(r"```python\n(.*?)```", page.partition("\n## Rewards\n")[2].partition("\n## ")[0], flags=re.DOTALL)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "rewards.py").write_text(function)
    monkeypatch.chdir(tmp_path)
    config = configurations.online()
    exec(named, {"config": config, "ConfigDict": ConfigDict})
    panel = judging.judge(config, load={"judge_model": lambda name, **options: lambda asked: ["Grade: 10"] * len(asked)})
    judged = panel([prompt("1 + 1?", answer="2"), prompt("?", answer="3")], ["2, thank you", "Please, 3"], SAMPLES)
    assert judged.rewards.tolist() == [1 + 0.25 + 1, 1 + 0.5 + 1]


async def right(prompts, completions, *, answer, **columns):
    return [float(wanted in completion) for wanted, completion in zip(answer, completions, strict=True)]


@pytest.mark.parametrize(
    ("blocks", "shown"),
    [
        ({"mine": {"reward": "OWN:shrt"}}, "rewards.mine.reward: .*own.py has no 'shrt'; nearest: 'short'"),
        ({"mine": {"reward": "exact_mach"}}, "rewards.mine.reward: there is no 'exact_mach'; nearest: 'exact_match'.*'FILE.py:NAME'"),
        ({"exact_mach": 1.0}, "rewards.exact_mach.reward: there is no 'exact_mach'; nearest: 'exact_match'.*'FILE.py:NAME'"),
        ({"mine": {"reward": "no/such.py:f"}}, "rewards.mine.reward: there is no file 'no/such.py'"),
        ({"mine": {"reward": "OWN:wanted"}}, "'mine' is 3.0, which is no function"),
        ({"mine": {"reward": "OWN:short", "limt": 2}}, "'mine' has no option 'limt'; nearest: 'limit'"),
        ({"cosine": {"max_tokens": 4, "correct": "OWN:shrt"}}, "rewards.cosine.correct: .* has no 'shrt'"),
        ({"target_length": 1.0}, "'target_length' needs the option 'target_tokens'"),
        ({"judge_model": 1.0}, 'rewards.judge_model: which model.*"model": '),
        ({"strict": {"reward": "reward_model"}}, 'rewards.strict: which model.*"folder": '),
    ],
)
def test_a_reward_that_cannot_judge_is_refused_with_the_nearest(blocks, shown, own):
    named = {
        name: {field: value.replace("OWN", own) if isinstance(value, str) else value for field, value in block.items()}
        if isinstance(block, dict)
        else block
        for name, block in blocks.items()
    }
    with pytest.raises(ValueError, match=shown):
        judge(named)


def test_a_column_that_no_row_has_is_asked_for_when_prompts_are_read():
    config = configs.load(CONFIG)
    rows = [prompt("1 + 1?", "2", test=None), prompt("?", tets=["1"])]
    with config.unlocked():
        config.rewards = {"numeric_match": 1.0, "repetition": 1.0}
        panel.check_columns(config, rows, field="data.sources")
        config.rewards = {"mine": {"reward": "tests.cli.judging_test:checked", "weight": 2.0}}
        with pytest.raises(ValueError, match="rewards.mine: it needs 'tests', which no row of data.sources has.*nearest columns: 'tets'"):
            panel.check_columns(config, rows, field="data.sources")
        config.rewards.mine.tests = 3
        panel.check_columns(config, rows, field="data.sources")
        config.rewards = {"played": {"reward": "environment"}}
        with pytest.raises(ValueError, match="rewards.played: it needs 'episode_rewards'"):
            panel.check_columns(config, rows, field="data.sources")


def checked(prompts, completions, *, tests):
    return [float(tests)] * len(prompts)


def test_a_model_of_this_process_judges_by_the_likeliest_answer(base):
    ask = grader.load(str(base.folder), dtype="float32", max_tokens=5, batch_size=2)
    tokenizer, questions = byte_tokenizer(), ["Grade it.", "And this one", "?"]
    likeliest = jax.jit(lambda x: base.model.unembed(base.model.head(base.params), base.model.apply(base.params, x)[0]).argmax(axis=-1))
    for question, answer in zip(questions, ask(questions), strict=True):
        tokens = rollout.Encoder(base.model, tokenizer).encode([{"role": "user", "content": question}]).tolist()
        for _ in range(5):
            padded = np.pad(np.asarray(tokens, np.int32), (0, 64 - len(tokens)))  # which nothing before it sees
            tokens.append(int(likeliest(padded[None])[0, len(tokens) - 1]))
        assert answer == tokenizer.decode(tokens[-5:], skip_special_tokens=True)
    loaded = []
    load = lambda name, **options: loaded.append((name, options)) or (lambda asked: [f"Grade: {len(asked)}"] * len(asked))  # noqa: E731
    blocks = {
        "judge_model": {"model": "big", "dtype": "bfloat16", "max_tokens": 9, "low": 0.0, "high": 4.0},
        "second": {"reward": "judge_model", "model": "small", "weight": 0.5},
    }
    judged = judge(blocks, load={"judge_model": load})([prompt("a", "b"), prompt("c", "d")], ["x", "y"], SAMPLES)
    assert loaded == [("big", {"dtype": "bfloat16", "max_tokens": 9}), ("small", {})]
    np.testing.assert_allclose(judged.rewards, [0.5 + 0.5 / 9] * 2)


def test_a_reward_that_fails_says_how_to_go_on_without_it():
    with pytest.raises(ValueError, match="'numeric_match' needs 'answer'|judging.on_error='skip'"):
        judge({"target_length": {"target_tokens": "four"}})([prompt("1 + 1?", "2")], ["2"], SAMPLES[:1])


def test_an_episode_whose_environment_failed_is_worth_nothing_that_could_be_learnt():
    """Not even what it was given before: that is no sum of all its turns."""

    def played(reward: float, failure: str) -> rollout.Sample:
        said = ({"role": "assistant", "content": "2"},)
        return dataclasses.replace(SAMPLES[0], episode=rollout.Episode(np.ones(1, bool), said, reward, failure))

    config = configs.load(CONFIG)
    with config.unlocked():
        config.rewards, config.judging.on_error = {"environment": 2.0, "numeric_match": 1.0}, "skip"
    samples = [played(3.0, "OSError: gone"), played(4.0, "")]
    judged = judging.judge(config)([prompt("1 + 1?", "2")] * 2, ["2"] * 2, samples)
    np.testing.assert_array_equal(judged.rewards, [np.nan, 9.0])
    np.testing.assert_array_equal(judged.scores["environment"], [np.nan, 4.0])
    np.testing.assert_array_equal(judged.scores["numeric_match"], [np.nan, 1.0])
    assert judged.failures == (rewards.Failure("environment", 0, "1 + 1?", "ended an episode by OSError: gone"),)


@pytest.fixture
def processes(monkeypatch):
    """`processes(count, work) -> [work(), …]`: threads that stand for the processes of a run, and hear of each other as those do."""
    mine = threading.local()

    def run(count, work):
        barrier, said = threading.Barrier(count, timeout=30), [None] * count

        def gathered(value):
            said[mine.index] = json.dumps(value)
            barrier.wait()
            found = list(map(json.loads, said))
            barrier.wait()
            return found

        def begin(index):
            mine.index = index
            return work()

        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: mine.index)
        monkeypatch.setattr(runtime, "gathered", gathered)
        with ThreadPoolExecutor(count) as pool:
            return [found.result() for found in [pool.submit(begin, index) for index in range(count)]]

    return run


ASKED = [prompt(f"{n}?", answer=str(n)) for n in range(3) for _ in range(2)]
TEXTS = ["0", "1", "1", "none", "2", "2"]


@pytest.mark.parametrize(("count", "each"), [(1, [3]), (2, [1, 2]), (3, [1, 1, 1]), (4, [0, 1, 1, 1])])
def test_every_process_judges_whole_prompts_and_hears_of_all(count, each, processes):
    panel, seen = judge({"numeric_match": 2.0, "target_length": {"target_tokens": 4}}), []

    def counted(prompts, texts, samples):
        seen.append(len(prompts) // 2)
        assert [p.asked for p in prompts[::2]] == [p.asked for p in prompts[1::2]]
        return panel(prompts, texts, samples)

    wanted = panel(ASKED, TEXTS, SAMPLES * 3)
    found = processes(count, lambda: judging.divided(counted, ASKED, TEXTS, SAMPLES * 3, per_prompt=2))
    assert sorted(seen) == [n for n in each if n] and len(found) == count
    for judged in found:
        np.testing.assert_array_equal(judged.rewards, wanted.rewards)
        assert judged.scores.keys() == wanted.scores.keys()
        for name, scores in wanted.scores.items():
            np.testing.assert_array_equal(judged.scores[name], scores)


def test_what_one_process_cannot_judge_is_known_to_all(processes):
    def lenient(prompts, texts, samples):
        scores = np.asarray([np.nan if text == "none" else 1.0 for text in texts])
        failures = tuple(rewards.Failure("r", row, prompts[row].asked, "raised") for row in np.flatnonzero(np.isnan(scores)).tolist())
        return rewards.Judged({"r": scores}, scores, failures)

    for judged in processes(2, lambda: judging.divided(lenient, ASKED, TEXTS, SAMPLES * 3, per_prompt=2)):
        assert np.flatnonzero(np.isnan(judged.rewards)).tolist() == [3] and judged.failures == (rewards.Failure("r", 3, "1?", "raised"),)

    def strict(prompts, texts, samples):
        if "none" in texts:
            raise ValueError("reward 'r' raised OSError")
        return lenient(prompts, texts, samples)

    def heard():
        with pytest.raises(ValueError, match="in process 1: reward 'r' raised OSError"):
            judging.divided(strict, ASKED, TEXTS, SAMPLES * 3, per_prompt=2)
        return True

    assert processes(2, heard) == [True, True]
