import contextlib
import os
import threading
import time

import pytest

from ftjax.rewards.maths import _VERIFIER, maths
from ftjax.rewards.worker import WorkerError

# completion, answer -> score with LaTeX alone (TRL's accuracy_reward), score with plain text too
EXAMPLES = [
    (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0, 1.0),
    (r"My answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0, 0.0),
    (r"$0.5$, or \boxed{\frac{2}{6}}", r"\frac{1}{3}", 1.0, 1.0),
    (r"\boxed{(x+1)^2}", "$x^2+2x+1$", 1.0, 1.0),
    ("so it is 72", "72", 0.0, 1.0),
    ("1/3", r"\frac{1}{3}", 0.0, 1.0),
    ("", "72", 0.0, 0.0),
    ("\\boxed{" * 500, "72", 0.0, 0.0),
    (r"\boxed{72}", "no formula", None, None),
    (r"\boxed{72}", None, None, None),
]


def test_formulas_are_compared_by_value():
    completions, answers, latex, plain = zip(*EXAMPLES, strict=True)
    assert maths([""] * len(answers), completions, answer=answers) == list(latex)
    assert maths([""] * len(answers), completions, answer=answers, plain=True) == list(plain)


def test_only_what_follows_the_thoughts_counts():
    completions = [r"\boxed{2}</think>\boxed{3}", r"\boxed{3}</think>so", r"\boxed{3}"]
    assert maths([""] * 3, completions, answer=["3"] * 3, after="</think>") == [1.0, 0.0, 0.0]


def test_threads_may_ask_and_a_tower_of_powers_does_not_hang():
    """`signal.alarm` would work in neither case: no main thread, and one multiplication that never comes back."""
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(maths([""] * 2, [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"], answer=["3"] * 2, seconds=1.0))
    )
    thread.start()
    thread.join(60.0)
    assert found == [0.0, 1.0]


def test_what_is_late_is_not_judged():
    """Those that begin after the first ones have taken all the time there is, of which each asks for a part."""
    completions = [r"\boxed{9^{9^{9^{9}}}}", *[r"\boxed{3}"] * 40]
    found = maths([""] * 41, completions, answer=["3"] * 41, seconds=1.0, most=0.5)
    assert found == [0.0] + [1.0] * 15 + [None] * 25


def test_a_signal_to_the_terminal_s_programs_does_not_reach_the_verifier_and_it_is_closed_while_it_is_asked():
    assert maths([""], [r"\boxed{3}"], answer=["3"]) == [1.0]
    assert os.getpgid(_VERIFIER._process.pid) != os.getpgid(0)
    asked = threading.Thread(target=lambda: _asked([r"\boxed{9^{9^{9^{9}}}}"] * 3))
    asked.start()
    time.sleep(0.5)
    began, session = time.monotonic(), _VERIFIER._process.pid
    _VERIFIER.close()
    asked.join(30.0)
    assert time.monotonic() - began < 10 and not asked.is_alive()
    while time.monotonic() - began < 10 and _lives(session):
        time.sleep(0.05)
    assert not _lives(session)  # nor the fork that was computing


def _lives(session):
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def _asked(completions):
    with contextlib.suppress(WorkerError):
        maths([""] * len(completions), completions, answer=["3"] * len(completions), seconds=20.0)


def test_without_the_library_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ftjax\[maths\]'"):
        maths([""], ["1"], answer=["1"])
