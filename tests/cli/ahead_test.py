"""Which weights sample which experience is a matter of its number alone, and what is sampled ahead holds up nothing."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from ftjax.cli import ahead
from ftjax.cli.ahead import Devices, with_past, without_past
from ftjax.types import TrainState


def weights(value: float) -> dict[str, jax.Array]:
    """W(value): what is trained before that experience."""
    return {"lora": {"a": jnp.float32(value)}}


def begun(bound: int) -> TrainState:
    """The state before the first step, with its past."""
    zero = jnp.zeros((), jnp.int32)
    return with_past(TrainState(zero, jax.random.key(0), weights(0), (), {"reference": zero}), bound=bound)


def begin(sample, bound: int, *, count: int, devices: Devices | None = None, beside: bool = True) -> ahead.Ahead:
    """The experiences of a run that begins."""
    return ahead.Ahead(sample, without_past(begun(bound))[1], count=count, devices=devices or Devices(), beside=beside)


def trained(sampled: ahead.Ahead, start: int, end: int) -> list[tuple[int, float]]:
    """What each experience was sampled by, where a step overwrites the weights."""
    found = []
    for index in range(start, end):
        mine = weights(index)
        found.append(sampled(mine, index))
        mine["lora"]["a"].delete()
    return found


def by(trainable, index: int) -> tuple[int, float]:
    return index, float(trainable["lora"]["a"])


@pytest.mark.parametrize("bound", [0, 1, 2, 7])
def test_an_experience_is_sampled_by_the_weights_of_so_many_experiences_before(bound):
    sampled = begin(by, bound, count=5)
    assert trained(sampled, 0, 5) == [(index, max(0, index - bound)) for index in range(5)]
    sampled.close()


@pytest.mark.parametrize("stopped", [0, 1, 2, 4])
def test_a_run_that_goes_on_samples_by_the_same_weights(stopped):
    first = begin(by, 2, count=9)
    before = trained(first, 0, stopped)
    first.close()
    stored = with_past(begun(0), first.past, bound=2)
    state, past = without_past(jax.tree.map(jnp.copy, stored))
    assert state.carried == {"reference": 0}
    second = ahead.Ahead(by, past, count=5, devices=Devices())
    assert before + trained(second, stopped, 5) == [(index, max(0, index - 2)) for index in range(5)]
    second.close()


def test_without_a_bound_a_checkpoint_is_as_it_was():
    state = begun(0)
    assert with_past(state, (), bound=0) is state and ahead.SAMPLED_BY not in state.carried
    assert set(begun(1).carried) == {"reference", ahead.SAMPLED_BY}


def test_a_step_does_not_wait_for_the_next_experience_and_none_is_sampled_beyond_the_last():
    judged, seen = threading.Event(), []

    def slow(trainable, index):
        assert index == 0 or judged.wait(30)
        seen.append(index)
        return index

    sampled = begin(slow, 1, count=3)
    assert sampled(weights(0), 0) == 0 and seen == [0]  # while the next one is not judged yet
    judged.set()
    assert [sampled(weights(index), index) for index in (1, 2)] == [1, 2]
    sampled.close()
    assert seen == [0, 1, 2]


def test_what_goes_wrong_in_the_thread_is_raised_where_the_experience_is_asked_for():
    def broken(trainable, index):
        if index == 1:
            raise ValueError("reward 'x' raised OSError")
        return index

    sampled = begin(broken, 1, count=3)
    assert sampled(weights(0), 0) == 0
    with pytest.raises(ValueError, match="reward 'x' raised OSError"):
        sampled(weights(1), 1)
    sampled.close()


def test_closing_waits_for_the_devices_and_leaves_a_judge_that_hangs():
    begins, goes_on, answers, done = threading.Event(), threading.Event(), threading.Event(), []
    devices = Devices()

    def sample(trainable, index):
        if index == 0:
            return
        with devices:
            begins.set()
            goes_on.wait(30)
            with pytest.raises(ahead.Ended):  # between two blocks of tokens
                devices.going()
            done.append("sampled")
        answers.wait(30)
        with devices:
            done.append("another round")

    sampled = begin(sample, 1, count=3, devices=devices)
    sampled(weights(0), 0)
    assert begins.wait(30)
    closing = threading.Thread(target=sampled.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive() and not done
    goes_on.set()
    closing.join(30)
    assert not closing.is_alive() and done == ["sampled"]
    workers = [thread for thread in threading.enumerate() if thread.name == "ahead"]
    answers.set()
    for worker in workers:
        worker.join(30)
    assert done == ["sampled"]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("bound", [1, 2])
def test_on_several_devices_it_judges_beside_the_steps_and_samples_while_it_is_waited_for(bound, rounds):
    devices, training, judged, wrong = Devices(), threading.Event(), [threading.Event() for _ in range(6)], []

    def sample(trainable, index):
        for round in range(rounds):
            with devices:
                wrong.extend([index] if training.is_set() else [])
            if index and not round and not judged[index].wait(10):  # by a judge that answers only while the steps run
                wrong.append(index)
        return by(trainable, index)

    sampled = begin(sample, bound, count=6, devices=devices, beside=False)
    for index in range(6):
        assert sampled(weights(index), index) == (index, max(0, index - bound))
        training.set()
        judged[min(index + 1, 5)].set()
        with devices:  # an evaluation
            time.sleep(0.02)
        training.clear()
    assert not wrong
    sampled.close()
