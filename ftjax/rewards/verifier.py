"""The inside of `worker`: a script that loads a library once and answers in forks of itself, which may hang or die.

Run by path or from a jail as `python -I verifier.py NAME`. The first line says where libraries are, each further one has `items`, `seconds`
for each and whether they may share a fork, `together`; an answer is a list of `{"value": …}` or `{"error": …}`. What text from a model does
to a fork is gone with it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30
_BOARDS = ("arc_agi", "rearc")


def maths() -> Callable[[dict[str, Any]], Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # As TRL's accuracy_reward: boxed answers first, and no formula that no sign points to.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )

    def answer(request: dict[str, Any]) -> float | None:
        right = parse(request["answer"], parsing_timeout=None)
        if not right:
            return None
        forms = [latex, ExprExtractionConfig()] if request["plain"] else [latex]
        given = parse(request["text"], extraction_config=forms, extraction_mode="first_match", parsing_timeout=None)
        return float(verify(right, given, timeout_seconds=None))

    answer({"text": r"\boxed{(x+1)^2}", "answer": "$x^2+2x+1$", "plain": True})  # imports what each fork would
    return answer


def reasoning() -> Callable[[dict[str, Any]], Any]:
    import reasoning_gym

    def answer(request: dict[str, Any]) -> float | None:
        if request["task"] not in reasoning_gym.factory.DATASETS:
            return None
        if request["task"] in _BOARDS:  # they compare tuples, and JSON has none
            known = request["entry"]["metadata"]
            known["output"] = tuple(tuple(row) for row in known["output"])
        return float(reasoning_gym.get_score_answer_fn(request["task"])(request["text"], request["entry"]))

    return answer


def serve(name: str) -> None:
    """Answer until the input ends."""
    sys.path += json.loads(sys.stdin.readline())
    answer = {"maths": maths, "reasoning": reasoning}[name]()
    answers = os.fdopen(os.dup(1), "w")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)  # libraries print
    os.dup2(null, 2)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        items, replies = request["items"], []
        while len(replies) < len(items):
            rest = items[len(replies) :] if request["together"] else items[len(replies) : len(replies) + 1]
            replies += _fork(answer, rest, request["seconds"], close=(0, answers.fileno()))
        print(json.dumps(replies), file=answers, flush=True)


def _fork(answer: Callable[[dict[str, Any]], Any], items: list[Any], seconds: float, *, close: tuple[int, ...]) -> list[dict[str, Any]]:
    """Answer items in a fork, up to the first one that takes too long or the fork's life; what speaks for the others is closed to it."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        for file in (*close, receive):
            os.close(file)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        for item in items:
            try:
                reply = {"value": answer(item)}
            except BaseException as error:
                reply = {"error": f"{type(error).__name__}: {error}"[:500]}
            os.write(send, json.dumps(reply).encode() + b"\n")
        os._exit(0)
    os.close(send)
    replies, data = [], b""
    while len(replies) < len(items):
        while b"\n" not in data and select.select([receive], [], [], seconds)[0] and (chunk := os.read(receive, 1 << 16)):
            data += chunk
        line, newline, data = data.partition(b"\n")
        replies.append(_reply(line) if newline else {"error": f"no answer within {seconds:g} s, or it died"})
        if not newline:
            break
    os.close(receive)
    os.kill(child, signal.SIGKILL)  # it is done, late or dead
    os.waitpid(child, 0)
    return replies


def _reply(line: bytes) -> dict[str, Any]:
    """Read what a fork wrote, which may be anything."""
    try:
        match json.loads(line):
            case {"value": float() | None as value}:
                return {"value": value}
            case {"error": str(error)}:
                return {"error": error}
    except (ValueError, RecursionError):
        pass
    return {"error": "what it said is no answer"}


if __name__ == "__main__":
    serve(sys.argv[1])
