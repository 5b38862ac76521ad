import asyncio
import sys
import threading
import time

import numpy as np
import pytest

from ftjax.rewards import RewardError, exact_match, judge, panel

PROMPTS, COMPLETIONS, COLUMNS = ["p0", "p1", "p2"], ["a", "b", "c"], {"answer": ["a", "x", None]}


def constant(*values):
    return lambda prompts, completions, **columns: [values[PROMPTS.index(prompt)] for prompt in prompts]


def run(rewards, weights=(), **options):
    return judge(rewards, weights, PROMPTS, COMPLETIONS, COLUMNS, **options)


def test_the_sum_is_weighted_and_leaves_out_what_does_not_apply():
    judged = run({"exact": exact_match, "other": constant(2, np.float32(0.5), None), "third": constant(True, None, None)}, (1.0, -0.5, 3.0))
    np.testing.assert_array_equal(judged.scores["exact"], [1.0, 0.0, np.nan])
    np.testing.assert_array_equal(judged.rewards, [1.0 - 1.0 + 3.0, -0.25, np.nan])
    assert judged.failures == () and judged.rewards.dtype == np.float64


def test_rewards_work_at_the_same_time_coroutines_too():
    meeting = threading.Barrier(3, timeout=10.0)

    def waits(prompts, completions, **columns):
        meeting.wait()
        return [1.0] * len(prompts)

    async def awaits(prompts, completions, **columns):
        await asyncio.sleep(0.0)
        return waits(prompts, completions)

    assert run({"a": waits, "b": awaits, "c": awaits}).rewards.tolist() == [3.0] * 3


def raises(prompts, completions, **columns):
    if "p1" in prompts:
        raise KeyError("oh")
    return [1.0] * len(prompts)


def leaves(prompts, completions, **columns):
    if "p1" in prompts:
        sys.exit(0)
    return [1.0] * len(prompts)


async def hangs(prompts, completions, **columns):
    await asyncio.sleep(60.0 if "p1" in prompts else 0.0)
    return [1.0] * len(prompts)


def blocks(prompts, completions, **columns):
    time.sleep(1.0 if "p1" in prompts else 0.0)
    return [1.0] * len(prompts)


def short(prompts, completions, **columns):
    return [1.0 for prompt in prompts if prompt != "p1"]


def nothing(prompts, completions, **columns):
    return None if "p1" in prompts else [1.0] * len(prompts)


@pytest.mark.parametrize(
    "reward, reason",
    [
        (raises, "raised KeyError: 'oh'"),
        (leaves, "raised SystemExit"),
        (hangs, "did not return within 0.3 s"),
        (blocks, "did not return within 0.3 s"),
        (short, "returned 0 scores for 1 completions"),
        (nothing, "raised TypeError"),
        (constant(1.0, float("nan"), 1.0), "returned nan"),
        (constant(1.0, float("-inf"), 1.0), "returned -inf"),
        (constant(1.0, "two", 1.0), "returned 'two', which is no number"),
        (constant(1.0, [1.0, 2.0], 1.0), "which is no number"),
        (constant(1.0, 10**400, 1.0), "which is no number"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_prompt_and_the_run_stops_or_goes_on(reward, reason):
    judged = run({"fine": constant(1, 1, 1), "bad": reward}, timeout=0.3, on_error="skip")
    assert judged.rewards.tolist() == [2.0, 1.0, 2.0]
    (failure,) = judged.failures
    assert (failure.reward, failure.row, failure.prompt) == ("bad", 1, "p1") and reason in failure.reason
    with pytest.raises(RewardError, match="reward 'bad' .*row 1, prompt 'p1'.*on_error"):
        run({"fine": constant(1, 1, 1), "bad": reward}, timeout=0.3)


def test_rows_by_themselves_are_judged_a_few_at_a_time_and_not_for_ever(monkeypatch):
    monkeypatch.setattr(panel, "AT_ONCE", 2)
    running, most = set(), []

    def slow(prompts, completions, **columns):
        if len(prompts) > 1:
            raise OSError("not together")
        running.add(prompts[0])
        most.append(len(running))
        time.sleep(0.2)
        running.discard(prompts[0])
        return [1.0]

    many = {"prompts": [f"p{n}" for n in range(8)], "completions": [""] * 8, "columns": {}}
    judged = judge({"slow": slow}, (), **many, timeout=0.3, on_error="skip")
    assert max(most) == 2 and np.isnan(judged.rewards).tolist() == [False] * 4 + [True] * 4
    assert "was not asked by itself: the rows before it took 0.3 s" in str(judged.failures[0]) and len(judged.failures) == 4


def test_a_call_that_fails_only_over_all_rows_fails_for_all():
    def alone(prompts, completions, **columns):
        return [1.0] if len(prompts) == 1 else []

    judged = run({"fine": constant(1, 1, 1), "alone": alone}, on_error="skip")
    assert judged.rewards.tolist() == [1.0] * 3
    assert "returned 0 scores for 3 completions, though it judges each row alone" in str(judged.failures[0])


def test_what_hangs_is_waited_for_once_and_not_row_by_row():
    def hangs(prompts, completions, **columns):
        time.sleep(1.5)
        return [1.0] * len(prompts)

    start = time.monotonic()
    assert len(run({"a": hangs, "b": hangs}, timeout=0.3, on_error="skip").failures) == 6
    assert time.monotonic() - start < 1.4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"columns": {"answers": [1, 2, 3]}}, "'exact_match' needs 'answer'.*nearest columns: 'answers'"),
        ({"columns": {"answer": [1]}}, "one length"),
        ({"prompts": [], "completions": [], "columns": {}}, "not empty"),
        ({"weights": (1.0, 2.0)}, "1 rewards with 2 weights"),
        ({"rewards": {}}, "0 rewards"),
        ({"on_error": "skipp"}, "nearest: 'skip'"),
    ],
)
def test_what_cannot_be_judged_is_refused_at_once(change, message):
    arguments = {"rewards": {"exact_match": exact_match}, "weights": (), "prompts": PROMPTS, "completions": COMPLETIONS, "columns": COLUMNS}
    with pytest.raises(ValueError, match=message):
        judge(**(arguments | change))
