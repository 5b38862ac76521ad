"""Calls side by side: none holds up another, and none ends the caller."""

import threading
import time

from ftjax.rollout import deadline


def test_results_come_in_order_and_what_fails_is_returned():
    def leave():
        raise SystemExit(3)

    found = deadline.within(5.0, [lambda: "a", lambda: {}["x"], leave, lambda: "b"])
    assert found[0] == "a" and found[3] == "b" and isinstance(found[1], KeyError) and isinstance(found[2], SystemExit)


def test_a_call_that_raises_a_timeout_itself_is_not_one_that_hangs():
    def raises():
        raise TimeoutError("its own")

    assert str(deadline.within(5.0, [raises])[0]) == "its own"


def test_what_hangs_costs_its_time_once_and_the_others_nothing(monkeypatch):
    monkeypatch.setattr(deadline, "AT_ONCE", 4)
    gate, began = threading.Event(), time.monotonic()
    found = deadline.within(1.0, [gate.wait] * 4 + [lambda n=n: n for n in range(9)])
    gate.set()
    assert time.monotonic() - began < 5 and found[4:] == list(range(9))
    assert all(isinstance(one, TimeoutError) and "within 1 s" in str(one) for one in found[:4])


def test_coroutines_are_waited_for():
    async def four():
        return 4

    assert deadline.within(5.0, [four, lambda: 5]) == [4, 5]
