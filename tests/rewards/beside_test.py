"""Calls side by side are bounded over all who ask, fail as the first of them, and keep no program from ending."""

import subprocess
import sys
import threading
import time

import pytest

from ftjax.rewards.beside import beside


def test_so_many_run_at_a_time_whoever_asks():
    running, most, lock = 0, 0, threading.Lock()

    def call(value):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.02)
        with lock:
            running -= 1
        return value

    found = []
    ask = lambda first: found.append(beside([lambda n=n: call(n) for n in range(first, first + 6)], at_once=3, whose="test"))  # noqa: E731
    threads = [threading.Thread(target=ask, args=(10 * n,)) for n in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == 3 and sorted(found) == [list(range(first, first + 6)) for first in (0, 10, 20)]


def test_the_first_that_fails_is_raised_and_nothing_further_begins():
    begun = []

    def call(n):
        begun.append(n)
        if n == 1:
            raise OSError("no")
        time.sleep(0.01)
        return n

    with pytest.raises(OSError, match="no"):
        beside([lambda n=n: call(n) for n in range(100)], at_once=1, whose="fails")
    time.sleep(0.05)
    assert len(begun) < 100


def test_what_hangs_does_not_keep_a_program_from_ending():
    program = (
        "import threading, time\nfrom ftjax.rewards.beside import beside\n"
        "hang = [lambda: time.sleep(60)] * 4\n"
        "threading.Thread(target=beside, args=(hang,), kwargs={'at_once': 2, 'whose': 'x'}, daemon=True).start()\ntime.sleep(0.2)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=40)
