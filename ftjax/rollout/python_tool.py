"""A Python interpreter as a tool, each program in a jail of its own (`ftjax.rewards.sandbox`)."""

from __future__ import annotations

from ftjax.rewards import sandbox


def python(code: str) -> str:
    """Runs a Python program with the standard library and returns what it prints.

    Args:
        code: The program.
    """
    ran = sandbox.run(code)
    if ran.ended != "exit":
        return f"{ran.stdout}\nerror: the program took too long" if ran.ended == "time" else f"{ran.stdout}\nerror: it printed too much"
    return ran.stdout if ran.exit_code == 0 else f"{ran.stdout}\nerror: {ran.stderr.strip()[-500:]}".strip()
